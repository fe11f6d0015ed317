"""The tutorials cannot rot: every command and every block of code on their pages is run, and every quoted line still stands.

What a page may hold, and what is checked:
  ```bash               commands, one a line (a backslash joins lines). They are run, in the order of the pages, in one folder.
  ```python ... ```output   a program, run as it stands.
  ```python (no output)     a quote: it stands verbatim (indentation apart; "..." skips lines) in the file named just above it.
  ```output             what the block above it printed. Here everything is run *small* (SMALL: a base model of 10 steps, few
                        questions), so what is compared is the shape: the lines' words up to their first number or colon.
                        After a line `<!-- exact -->` the output is compared to the letter.
  <!-- not run: why -->   before a bash block: its flags are parsed by the script itself, nothing is run.
  <!-- walk only: why --> before a bash block: it is run in the full walk below, not here.
  <!-- picture: PATH --> before an image: PATH, made by a command of the page, is what the image is a copy of; or PATH is the
                        script that makes it.

The outputs are never edited by hand. The full walk, in which every command runs as it is written, puts them into the pages,
with the pictures and the seconds (processor time of one thread) that each page took:

    python tests/test_tutorials.py --write                      # all pages, about half an hour
    python tests/test_tutorials.py --write 05 06                # these again, from where page 04 left the folder
"""
import argparse
import contextlib
import importlib
import io
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.stem[:2]: page for page in sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.md"))}
SCRIPTS = ("vae", "prefix", "sft", "grpo", "rewards", "evaluate")

# What a command gets here on top of its own flags (the last one counts), by the words it begins with.
SMALL = {"sft.py pretrain": "--steps 10",
         "sft.py --steps": "--steps 2 --batch 8",
         "sft.py": "--batch 8",
         "vae.py --": "--epochs 5",
         "grpo.py": "--base-steps 10 --steps 2 --prompts 2 --sft-batch 8 --eval-questions 4 "
                    "--arm-questions 2 --arm-samples 8",
         "evaluate.py": "--questions 4 --samples 8",
         "prefix.py": "--max-new-tokens 8"}

BLOCK = re.compile(r"^(?:<!-- (?P<marker>not run|walk only|picture): (?P<why>[^\n]*?) -->\n)?"
                   r"(?:```(?P<kind>bash|python)\n(?P<code>.*?)^```$"
                   r"(?P<gap>\n+(?:<!-- (?P<exact>exact) -->\n)?)?(?:(?<=\n)```output\n(?P<output>.*?)^```$)?"
                   r"|!\[[^\]]*\]\((?P<image>[^)]*)\))", re.DOTALL | re.MULTILINE)


def blocks(page):
    """The page's blocks and pictures in reading order, as match objects."""
    return list(BLOCK.finditer(page.read_text()))


def commands(code):
    """The commands of a bash block."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def script_of(command):
    """(module name, arguments) of `python X.py ...` or `torchrun ... X.py ...`; (None, words) of anything else."""
    words = shlex.split(command, comments=True)
    place = next((i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS and word.endswith(".py")), None)
    if words[0] not in ("python", "torchrun") or place is None:
        return None, words
    return words[place].removesuffix(".py"), words[place + 1:]


def link_scripts(folder):
    """Make a folder look like the root of a clone to the pages' commands; what they write stays in it."""
    for path in [*ROOT.glob("*.py"), ROOT / "tests"]:
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


def small(command):
    """The flags that make a command small."""
    return next((flags for start, flags in SMALL.items() if f" {start}" in command), "")


def shape(output):
    """The lines' words up to the first number or colon, spaces and repetitions left out: what a small run has in common.

    Remarks on pictures are left out: where matplotlib is missing there are none.
    """
    labels = []
    for line in re.sub(r"^no (pictures?|t-SNE).*$|^pictures?:? .*$|, picture .*$", "", output, flags=re.MULTILINE).splitlines():
        line = re.sub(r"^(python \w+\.py) .*", r"\1", line)             # a command that a script names: its name
        label = "|---|" if set(line) == set("|-") else " ".join(re.match(r"[^\d:]*:?", line.replace("-", " "))[0].split())
        if label and label != (labels or [""])[-1]:
            labels.append(label)
    return labels


# ---- the pages run small ------------------------------------------------------------------------------------------------

def run_small(command):
    """What a command prints. Our scripts run in this process (importing torch for each would take most of the time)."""
    command, pipe, filters = command.partition(" | ")
    name, argv = script_of(command)
    if name is None or command.startswith("torchrun"):
        torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
        line = f"{command.replace('torchrun', torchrun, 1)} {small(command)}" if name else command
        done = subprocess.run(["bash", "-c", line + pipe + filters], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(name).main(argv + shlex.split(small(command)))
    return subprocess.run(["bash", "-c", filters], input=printed.getvalue(), capture_output=True, text=True, check=True).stdout \
        if pipe else printed.getvalue()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Runs pages in order in one folder, each at most once: walk(number) gives the outputs of that page's blocks."""
    folder, done = tmp_path_factory.mktemp("walk"), {}
    link_scripts(folder)

    def up_to(number):
        before = os.getcwd()
        os.chdir(folder)
        try:
            for page in PAGES:
                if page <= number and page not in done:
                    done[page] = [run_block(block) for block in blocks(PAGES[page])]
        finally:
            os.chdir(before)
        return done[number]
    up_to.folder = folder
    return up_to


def run_block(block):
    """What the block prints; None for what is not run here."""
    if block["kind"] == "bash" and block["marker"] is None:
        return "".join(map(run_small, commands(block["code"])))
    if block["kind"] == "python" and block["output"] is not None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], "tutorial", "exec"), {"__name__": "__main__"})
        return printed.getvalue()


@pytest.mark.parametrize("number", PAGES)
def test_every_block_runs_and_prints_what_the_page_shows(number, walk):
    for block, printed in zip(blocks(PAGES[number]), walk(number)):
        if printed is not None and block["exact"]:
            assert printed == block["output"], block["code"]
        elif printed is not None and block["output"] is not None:
            assert shape(printed) == shape(block["output"]), (block["code"], printed)


@pytest.mark.parametrize("number", PAGES)
def test_pictures_are_made_by_the_page_and_are_small(number, walk):
    pytest.importorskip("matplotlib")
    walk(number)
    for block in blocks(PAGES[number]):
        if block["image"]:
            assert block["marker"] == "picture" and (walk.folder / block["why"]).is_file(), f"{block[0]}: no command makes it"
            picture = PAGES[number].parent / block["image"]
            assert picture.stat().st_size < (200_000 if block["why"].endswith(".py") else 150_000), picture


# ---- what can be checked without running ----------------------------------------------------------------------------------

@pytest.mark.parametrize("number", PAGES)
def test_quoted_code_still_stands_in_the_file_named_above_it(number):
    text = PAGES[number].read_text()
    for block in blocks(PAGES[number]):
        if block["kind"] == "python" and block["output"] is None:
            named = re.findall(r"\w+\.py", text[:block.start()].rstrip().rpartition("\n\n")[2])
            assert named, f"no file is named above\n{block['code']}"
            assert stands_in(block["code"], (ROOT / named[-1]).read_text()), (named[-1], block["code"])


def stands_in(quote, source):
    """Do the quote's lines stand in the source, in order and together but where a line "..." skips some?"""
    place = 0
    for part in re.split(r"^\s*\.\.\.\n", quote, flags=re.MULTILINE):
        found = [source.find("\n" + textwrap.indent(part, " " * n), place) for n in range(0, 17, 4)]
        place = max(found) + 1
        if not place:
            return False
    return True


@pytest.mark.parametrize("number", PAGES)
def test_commands_that_cannot_run_here_have_only_flags_that_exist(number):
    for block in blocks(PAGES[number]):
        for command in commands(block["code"]) if block["marker"] == "not run" else ():
            name, argv = script_of(command)
            script = importlib.import_module(name) if name else None
            if hasattr(script, "parse_args"):
                script.parse_args(argv)                     # exits where a flag or a value is wrong
            elif script:
                assert {word for word in argv if word.startswith("--")} <= flags_of(name), command


def without_code(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def flags_of(*names):
    """The flags of these scripts, as their --help lists them."""
    found = set()
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            importlib.import_module(name).main(["--help"])
        found |= set(re.findall(r"^  (--[a-z][a-z0-9-]*)", printed.getvalue(), flags=re.MULTILINE))
    return found


def test_flags_named_in_the_text_exist():
    for page in PAGES.values():
        text = without_code(page).replace("torchrun --nproc_per_node", "")
        named = {flag for code in re.findall(r"`[^`\n]+`", text) for flag in re.findall(r"--[a-z][a-z0-9-]*", code)}
        assert named <= flags_of(*SCRIPTS) | {"--help"}, (page.name, named - flags_of(*SCRIPTS))


def test_links_lead_somewhere_and_every_page_to_the_next():
    pages = list(PAGES.values())
    for page, following in zip(pages, [*pages[1:], None]):
        links = [link for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", without_code(page)) if not link.startswith("http")]
        assert all((page.parent / link).exists() for link in links), (page.name, links)
        assert following is None or following.name in links, f"{page.name} does not lead to {following.name}"


def test_the_checks_can_fail():
    source = "def f(x):\n    y = x + 1\n    z = 2 * y\n    return z\n"
    assert stands_in("y = x + 1\n...\nreturn z\n", source) and not stands_in("y = x + 2\n", source)
    assert not stands_in("return z\n...\ny = x + 1\n", source)
    assert shape("| a | 0.3 |\n|---|---|\nnoise: x\nnoise: y") == ["| a |", "|---|", "noise:"] != shape("| a | 0.3 |\nnoise: x")


# ---- the full walk --------------------------------------------------------------------------------------------------------

def run_full(block, folder):
    """(what the block prints, seconds of processor time), its commands run as they stand, on one thread."""
    program = block["kind"] == "python"
    if program:
        (folder / "try.py").write_text(block["code"])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"        # so that `python` and `torchrun` are this environment's
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", "python try.py" if program else block["code"]], cwd=folder,
                          capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path})
    if done.returncode:
        sys.exit(f"{block['code']}\n{done.stderr}\nended with status {done.returncode}")
    return done.stdout, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def write_page(page, folder, keep=None):
    """Run one page; put what it prints, its pictures and its seconds in place. keep: a command whose results are in the folder
    already; its output and the page's seconds stay as they are."""
    text, parts, end, seconds = page.read_text(), [], 0, {}
    for block in blocks(page):
        runs = block["marker"] != "not run" and (block["kind"] == "bash" or block["output"] is not None)
        printed = block["output"] or ""
        if runs and not (keep and keep in block["code"]):
            name = commands(block["code"])[0].split(" --")[0] if block["kind"] == "bash" else "a program"
            printed, spent = run_full(block, folder)
            seconds[name] = seconds.get(name, 0) + spent
            print(f"{page.stem}: {spent:6.1f} s  {name}", flush=True)
        if block["marker"] == "picture" and not block["why"].endswith(".py"):
            shutil.copy(folder / block["why"], page.parent / block["image"])
        if block["output"] is not None:
            parts += [text[end:block.start("output")], printed]
            end = block.end("output")
    if keep:
        return page.write_text("".join([*parts, text[end:]]))
    page.write_text(re.sub(r"(<!-- time -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{stamp(seconds)}\n{m[2]}",
                           "".join([*parts, text[end:]]), flags=re.DOTALL))


def stamp(seconds):
    """One line for a page: {command: seconds of processor time}, when and on what."""
    slow = ", ".join(f"`{name}` {spent:.0f} s" for name, spent in seconds.items() if spent > 10)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    return (f"*All that runs on this page took {sum(seconds.values()):.0f} s of processor time on one thread"
            f"{slow and f' ({slow})'}; {date.today()}, {os.cpu_count()} cores of {cpu[1] if cpu else 'a CPU'}.*")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="PAGE", required=True,
                        help="run these pages in full and fill in what they print (default: all)")
    parser.add_argument("--work", default="runs/walk", help="folder to run them in (default: runs/walk)")
    parser.add_argument("--keep", metavar="COMMAND",
                        help="do not run this one again, its results are in --work (default: none)")
    args = parser.parse_args()
    folder = Path(args.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    link_scripts(folder)
    for number in args.write or PAGES:
        start = folder / f"before-{number}"                     # a page is run again from where the pages before it ended
        if args.keep:
            pass
        elif start.exists() or number == min(PAGES):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            shutil.copytree(start, folder / "runs") if start.exists() else (folder / "runs").mkdir()
        else:
            shutil.copytree(folder / "runs", start)
        for later in folder.glob("before-*"):
            if later.name > start.name:
                shutil.rmtree(later)
        write_page(PAGES[number], folder, args.keep)


if __name__ == "__main__":
    main()
