"""The tutorials cannot rot: each command and block of code is run, each quoted line still stands.

What a page may hold, and what is checked:
  ```bash               commands, one a line (a backslash joins lines; a here-document belongs to
                        its command). They are run, in the order of the pages, in one folder.
  ```python ... ```output   a program, run as it stands.
  ```python (no output)     a quote: it stands verbatim (indentation apart; "..." skips lines) in
                        the file that the text above it links to last.
  ```output             what the block above it printed. Here everything is run *small* (SMALL: a
                        base model of 10 steps, few questions), so what is compared is the shape:
                        the lines' words up to their first number or colon. After a line
                        `<!-- exact -->` the output is compared to the letter.
  <!-- refused: why -->   before a bash block: each command ends with status 1, and its output is
                        the sentence that it says.
  <!-- not run: why -->   before a bash block: its flags are parsed by the script itself, no more.
  <!-- walk only: why --> before a bash block: it is run in the full walk below, not here.
  <!-- picture: PATH --> before an image: PATH, made by a command of the page, is what the image is
                        a copy of; or PATH is the script that makes it.

Outputs are never edited by hand. The full walk, in which every command runs as it is written, puts
them into the pages, with the pictures and the seconds (processor time of one thread) of each page:

    python tests/test_tutorials.py --write          # all pages, about half an hour
    python tests/test_tutorials.py --write 05 06    # these again, from where page 04 ended
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
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from glob import glob
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.stem[:2]: page for page in sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.md"))}

# The scripts that pages run, and the dataclass of each one's settings.
SCRIPTS = {
    "vae.py": "VAEConfig",
    "prefix.py": "PrefixConfig",
    "sft.py": "SFTConfig",
    "grpo.py": "GRPOConfig",
    "evaluate.py": "EvaluateConfig",
    "rewards.py": None,  # it has two flags and no settings
    "tutorials/tiny_world.py": "TinyWorldConfig",
    "tutorials/drawn_scenes.py": "DrawnScenesConfig",
    "tutorials/reproduce.py": "ReproduceConfig",
}

# The flags that make a command small, by the words that it holds. They stand behind its own, and
# the last one counts. The VAE is made in full, and the warm-up with the settings of grpo.py's own,
# where that will look for them.
BASE_STEPS = 10
SMALL = {
    "tiny_world.py": f"--steps {BASE_STEPS}",
    "sft.py": "--steps 2",
    "vae.py --": "--epochs 5",
    "grpo.py": f"--base-steps {BASE_STEPS} --sft-steps 2 --steps 2 --prompts 2 --eval-questions 4",
    "evaluate.py": "--questions 4 --samples 8",
    "reproduce.py --analyse": "--questions 4 --samples 8",
    "reproduce.py --sweep": "--questions 4 --samples 8",
    "prefix.py": "--max-new-tokens 8",
}


# ---- what stands on a page -----------------------------------------------------------------------


@dataclass
class Block:
    """A block of code with its output, or a picture."""

    kind: str  # "bash", "python" or "picture"
    content: str  # the code, or the file of the picture
    text_above: str  # the page up to it
    marker: str = ""  # "not run", "walk only", "refused" or "picture"
    why: str = ""  # what the marker says
    output: str | None = None
    is_exact: bool = False
    output_start: int = 0  # its place on the page, in characters
    output_end: int = 0

    @property
    def is_quote(self):
        return self.kind == "python" and self.output is None

    @property
    def is_program(self):
        return self.kind == "python" and self.output is not None


FENCE = r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$"
PICTURE = r"^!\[[^\]]*\]\((?P<picture>[^)]*)\)$"
PIECE = re.compile(f"{FENCE}|{PICTURE}", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"<!-- (not run|walk only|refused|picture): (.*) -->\n\Z")
EXACT = "<!-- exact -->"


def blocks_of(page):
    """The Blocks of a page in reading order."""
    text = page.read_text()
    blocks = []
    end = 0  # of the piece before
    for piece in PIECE.finditer(text):
        between = text[end : piece.start()]
        end = piece.end()
        text_above = text[: piece.start()]
        if piece["kind"] == "output":
            add_output(blocks[-1], piece, between)
            continue
        if piece["kind"] in ("bash", "python"):
            block = Block(piece["kind"], piece["code"], text_above)
        elif piece["picture"]:
            block = Block("picture", piece["picture"], text_above)
        else:  # a drawing of characters
            continue

        marker = MARKER.search(text_above)
        if marker:
            block.marker = marker[1]
            block.why = marker[2]
        blocks.append(block)
    return blocks


def add_output(block, piece, between):
    """The output of a block; between: what stands between the two."""
    block.is_exact = EXACT in between
    assert between.replace(EXACT, "").strip() == "", f"{between}\nstands before an output"
    block.output = piece["code"]
    block.output_start = piece.start("code")
    block.output_end = piece.end("code")


def commands_of(code):
    """The commands of a bash block, each with the lines of its here-document, if it has one."""
    commands = []
    end_of_document = None
    for line in code.replace(" \\\n", " ").splitlines():
        if end_of_document is not None:
            commands[-1] += f"\n{line}"
            if line == end_of_document:
                end_of_document = None
        elif line.strip() and not line.startswith("#"):
            commands.append(line)
            document = re.search(r"<<'(\w+)'", line)
            if document:
                end_of_document = document[1]
    return commands


@dataclass
class Call:
    """A run of one of our scripts."""

    script: str  # one of SCRIPTS
    arguments: list

    @property
    def module(self):
        return importlib.import_module(Path(self.script).stem)

    @property
    def settings_class(self):
        """The dataclass of its settings, or None."""
        name = SCRIPTS[self.script]
        return None if name is None else getattr(self.module, name)


def call_of(command):
    """The Call that a command is; None of any other command."""
    if not command.startswith(("python ", "torchrun ")):
        return None
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if word in SCRIPTS:
            return Call(word, words[place + 1 :])
    return None


def link_scripts(folder):
    """Make a folder look like the root of a clone to the commands; what they write stays in it."""
    for path in [*ROOT.glob("*.py"), ROOT / "tests", ROOT / "tutorials"]:
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path)


def shape(output):
    """What a small run has in common with a full one: words up to the first number or colon.

    A list of such beginnings of lines, spaces and repetitions left out. Remarks on pictures are
    left out, too: where matplotlib is missing there are none.
    """
    output = re.sub(r"^(no )?pictures?:? .*$|, picture .*$", "", output, flags=re.M)
    labels = []
    for line in output.splitlines():
        label = re.match(r"[^\d:]*:?", line.replace("-", " "))[0]
        label = " ".join(label.split())
        if set(line) == set("|-"):
            label = "|---|"
        if label and label not in labels[-1:]:
            labels.append(label)
    return labels


# ---- the pages run small -------------------------------------------------------------------------


def small(command):
    """The flags that make a command small."""
    for words, flags in SMALL.items():
        if words in command:
            return flags
    return ""


def run_bash(command, text=None):
    """What a command prints; text: what it reads."""
    job = subprocess.run(
        ["bash", "-c", command], input=text, capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 0, (command, job.stderr)
    return job.stdout


def run_small(command):
    """What a command prints.

    Our scripts run in this process: to import torch for each would take most of the time.
    """
    call = call_of(command)
    if call is None:
        return run_bash(command)
    command, _, filters = command.partition(" | ")
    if command.startswith("torchrun"):
        torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
        return run_bash(f"{command.replace('torchrun', torchrun, 1)} {small(command)}")

    arguments = []
    for word in call_of(command).arguments:
        arguments += sorted(glob(word)) if "*" in word else [word]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call.module.main(arguments + shlex.split(small(command)))
    if filters:
        return run_bash(filters, printed.getvalue())
    return printed.getvalue()


def refusal(command):
    """The sentence with which a command ends, as it is written: with status 1, before any work."""
    from vae import run_main

    call = call_of(command)
    with pytest.raises(SystemExit) as stop:
        run_main(partial(call.module.main, call.arguments), Path(call.script).name)
    assert isinstance(stop.value.code, str), command
    return f"{stop.value.code}\n"


def run_program(code):
    """What a program prints. What it adds to the tables of grpo.py and prefix.py is taken away."""
    import grpo
    import prefix

    program = compile(code, "a tutorial", "exec")
    algorithms = patch.dict(grpo.ALGORITHMS)
    sources = patch.dict(prefix.SOURCES)
    printed = io.StringIO()
    with algorithms, sources, contextlib.redirect_stdout(printed):
        exec(program, {"__name__": "__main__"})
    return printed.getvalue()


def run_block(block):
    """What the block prints; None for what is not run here."""
    if block.is_program:
        return run_program(block.content)
    if block.kind != "bash" or block.marker in ("not run", "walk only"):
        return None
    run = refusal if block.marker == "refused" else run_small
    outputs = [run(command) for command in commands_of(block.content)]
    return "".join(outputs)


class Walk:
    """Runs pages in their order in one folder, each at most once."""

    def __init__(self, folder):
        self.folder = folder
        self.outputs = {}  # by the page's number: what each of its blocks printed

    def up_to(self, number):
        """What the blocks of page `number` print, after all pages before it."""
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            for page_number, page in PAGES.items():
                if page_number <= number and page_number not in self.outputs:
                    outputs = [run_block(block) for block in blocks_of(page)]
                    self.outputs[page_number] = outputs
        finally:
            os.chdir(before)
        return self.outputs[number]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    import tiny_world

    folder = tmp_path_factory.mktemp("walk")
    link_scripts(folder)
    # Programs have no flags: the base that they ask for is as small as that of the commands.
    small_sft = {source: {**s, "steps": 2} for source, s in tiny_world.DEFAULTS["sft"].items()}
    small_base = patch.dict(tiny_world.DEFAULTS, base_steps=BASE_STEPS, sft=small_sft)
    path = patch.object(sys, "path", list(sys.path))  # task files put their folder there
    with small_base, path:
        yield Walk(folder)


@pytest.mark.parametrize("number", PAGES)
def test_every_block_runs_and_prints_what_the_page_shows(number, walk):
    blocks = blocks_of(PAGES[number])
    for block, printed in zip(blocks, walk.up_to(number)):
        if printed is None or block.output is None:
            continue
        if block.is_exact:
            assert printed == block.output, block.content
        else:
            assert shape(printed) == shape(block.output), (block.content, printed)


@pytest.mark.parametrize("number", PAGES)
def test_pictures_are_made_by_the_page_and_are_small(number, walk):
    pytest.importorskip("matplotlib")
    walk.up_to(number)
    for block in blocks_of(PAGES[number]):
        if block.kind != "picture":
            continue
        assert block.marker == "picture", f"{block.content}: who makes it?"
        assert (walk.folder / block.why).is_file(), f"{block.content}: no command makes {block.why}"
        limit = 200_000 if block.why.endswith(".py") else 150_000
        picture = PAGES[number].parent / block.content
        assert picture.stat().st_size < limit, picture


# ---- what can be checked without running ---------------------------------------------------------


@pytest.mark.parametrize("number", PAGES)
def test_quoted_code_still_stands_in_the_file_named_above_it(number):
    for block in blocks_of(PAGES[number]):
        if not block.is_quote:
            continue
        links = re.findall(r"\]\(([\w./]+\.py)\)", block.text_above)
        assert links, f"no file is named above\n{block.content}"
        source = (PAGES[number].parent / links[-1]).read_text()
        assert stands_in(block.content, source), f"not in {links[-1]}:\n{block.content}"


def stands_in(quote, source):
    """Whether the quote's lines stand in the source, in order; "..." stands for any lines."""
    start = 0
    for part in re.split(r"^\s*\.\.\.\n", quote, flags=re.MULTILINE):
        places = []
        for indent in range(0, 17, 4):
            places.append(source.find("\n" + textwrap.indent(part, " " * indent), start))
        if max(places) < 0:
            return False
        start = max(places) + 1
    return True


@pytest.mark.parametrize("number", PAGES)
def test_commands_that_cannot_run_here_have_only_flags_that_exist(number):
    from vae import parse_settings

    for block in blocks_of(PAGES[number]):
        if block.marker != "not run":
            continue
        for command in commands_of(block.content):
            call = call_of(command)
            if call is None:
                continue
            if call.settings_class is not None:
                # it exits, or raises ValueError, where a flag or a value is wrong
                parse_settings(call.settings_class, "", call.arguments)
            flags = {word for word in call.arguments if word.startswith("--")}
            assert spelled_alike(flags) <= flags_of(call.script), command


def spelled_alike(flags):
    """Flags may be written with dashes or underscores."""
    return {flag.replace("_", "-") for flag in flags}


def flags_of(script):
    """The flags of a script."""
    call = Call(script, [])
    if call.settings_class is None:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            call.module.main(["--help"])
        return spelled_alike(re.findall(r"^  (--[a-z][\w-]*)", text.getvalue(), flags=re.MULTILINE))
    return spelled_alike(f"--{field.name}" for field in fields(call.settings_class))


def text_of(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_flags_named_in_the_text_exist():
    known_flags = {"--help", "--nproc-per-node", "--write"}
    for script in SCRIPTS:
        known_flags |= flags_of(script)
    for page in PAGES.values():
        flags = set()
        for code in re.findall(r"`[^`\n]+`", text_of(page)):
            flags |= spelled_alike(re.findall(r"--[a-z][\w-]*", code))
        assert flags <= known_flags, (page.name, flags - known_flags)


def test_links_lead_somewhere_and_every_page_to_the_next():
    pages = list(PAGES.values())
    for page, following in zip(pages, [*pages[1:], None]):
        links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", text_of(page))
        links = [link for link in links if not link.startswith("http")]
        for link in links:
            assert (page.parent / link).exists(), (page.name, link)
        if following is not None:
            assert following.name in links, f"{page.name} does not lead to {following.name}"


# ---- the checks can fail -------------------------------------------------------------------------


def test_a_quote_that_does_not_stand_is_seen():
    source = "def f(x):\n    y = x + 1\n    z = 2 * y\n    return z\n"
    assert stands_in("y = x + 1\n...\nreturn z\n", source)
    assert stands_in("    y = x + 1\n    z = 2 * y\n", source)
    assert not stands_in("y = x + 2\n", source)
    assert not stands_in("y = x + 1\nreturn z\n", source)
    assert not stands_in("return z\n...\ny = x + 1\n", source)


def test_an_output_of_another_shape_is_seen():
    output = "| a | 0.3 |\n|---|---|\nnoise: x\nnoise: y\nsaved here, picture there"
    assert shape(output) == ["| a |", "|---|", "noise:", "saved here"]
    assert shape("| a | 0.3 |\nnoise: x") == ["| a |", "noise:"]
    assert shape("noise - x 7") == ["noise x"]


PAGE = """Text.

<!-- not run: why -->
```bash
python grpo.py --steps 3 \\
    --seed 1
cat > a.py <<'END'
x = "\\n"

END
python a.py
```

[`grpo.py`](../grpo.py):

```python
x = 1
```

```python
print(1)
```

<!-- exact -->
```output
1
```

```
neither
```

<!-- picture: runs/a.png -->
![a picture](a.png)
"""


def test_the_commands_of_a_page_are_read_as_bash_reads_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    block = blocks_of(page)[0]
    assert block.marker == "not run"
    first, document, last = commands_of(block.content)
    assert call_of(first) == Call("grpo.py", ["--steps", "3", "--seed", "1"])
    assert document == "cat > a.py <<'END'\nx = \"\\n\"\n\nEND"
    assert call_of(document) is None
    assert call_of(last) is None


def test_the_blocks_of_a_page_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    _, quote, program, picture = blocks_of(page)
    assert quote.is_quote
    assert quote.text_above.endswith("(../grpo.py):\n\n")
    assert program.is_program and program.is_exact
    assert program.output == "1\n"
    assert PAGE[program.output_start : program.output_end] == "1\n"
    assert (picture.content, picture.marker, picture.why) == ("a.png", "picture", "runs/a.png")


def test_a_flag_that_does_not_exist_is_seen():
    assert "--closing-questions" in flags_of("grpo.py")
    assert "--arms" not in flags_of("grpo.py")
    assert flags_of("rewards.py") == {"--check", "--task", "--data"}
    assert spelled_alike({"--max_new_tokens"}) == {"--max-new-tokens"}


# ---- the full walk -------------------------------------------------------------------------------


def children_seconds():
    """Processor time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_full(block, folder):
    """What the block prints, its commands run as they stand, on one thread."""
    code = block.content
    if block.is_program:
        (folder / "try.py").write_text(code)
        code = "python try.py"
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # so that `python` and `torchrun` are those of this environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    is_refused = block.marker == "refused"
    options = ["-o", "pipefail"] if is_refused else ["-e", "-o", "pipefail"]
    job = subprocess.run(
        ["bash", *options, "-c", code], cwd=folder, capture_output=True, text=True, env=environment
    )
    if (job.returncode != 0) != is_refused:
        sys.exit(f"{code}\n{job.stderr}\nended with status {job.returncode}")
    if is_refused:
        return job.stderr
    return job.stdout


def write_page(page, folder, keep=None):
    """Run one page; put what it prints, its pictures and its seconds in place.

    keep: a command whose results are in the folder already; its output and the page's seconds stay
    as they are.
    """
    outputs = []  # what the page's blocks print, or None where it stays
    seconds = {}  # by command
    blocks = blocks_of(page)
    for block in blocks:
        output = None
        if must_run(block, keep):
            name = name_of(block)
            before = children_seconds()
            output = run_full(block, folder)
            spent = children_seconds() - before
            seconds[name] = seconds.get(name, 0) + spent
            print(f"{page.stem}: {spent:6.1f} s  {name}", flush=True)
        outputs.append(output)
        if block.kind == "picture" and not block.why.endswith(".py"):
            shutil.copy(folder / block.why, page.parent / block.content)

    text = page.read_text()
    for block, output in reversed(list(zip(blocks, outputs))):
        if output is not None and block.output is not None:
            text = text[: block.output_start] + output + text[block.output_end :]
    if keep is None:
        new_stamp = f"<!-- time -->\n{stamp(seconds)}\n<!-- end -->"
        parts = re.split("<!-- time -->\n.*\n<!-- end -->", text)
        text = new_stamp.join(parts)
    page.write_text(text)


def name_of(block):
    """What a block is called where its seconds are told: by its first run of a script of ours."""
    if block.is_program:
        return "a program"
    commands = commands_of(block.content)
    calls = [command for command in commands if call_of(command)]
    first_line = (calls or commands)[0].splitlines()[0]
    return first_line.partition(" --")[0]


def must_run(block, keep):
    """Whether the full walk runs a block."""
    if block.marker == "not run" or (keep is not None and keep in block.content):
        return False
    return block.kind == "bash" or block.is_program


def stamp(seconds):
    """One line for a page: {command: seconds of processor time}, when and on what."""
    slow = []
    for name, spent in seconds.items():
        if spent > 10:
            slow.append(f"`{name}` {spent:.0f} s")
    slow = f" ({', '.join(slow)})" if slow else ""

    cpu = "a CPU"
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        model_name = re.search(r"model name\s*: (.*)", cpu_info.read_text())
        if model_name:
            cpu = model_name[1]
    return (
        f"*All that runs on this page took {sum(seconds.values()):.0f} s of processor time on one "
        f"thread{slow}; {date.today()}, {os.cpu_count()} cores of {cpu}.*"
    )


def restart_from(number, folder):
    """Put runs/ back to what it was when page `number` began; the first time, keep it for that."""
    start = folder / f"before-{number}"
    is_first_page = number == min(PAGES)
    if start.exists() or is_first_page:
        shutil.rmtree(folder / "runs", ignore_errors=True)
    if start.exists():
        shutil.copytree(start, folder / "runs")
    elif is_first_page:
        (folder / "runs").mkdir()
    else:
        shutil.copytree(folder / "runs", start)

    for later in folder.glob("before-*"):
        if later.name > start.name:
            shutil.rmtree(later)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        nargs="*",
        metavar="PAGE",
        required=True,
        help="run these pages in full and fill in what they print (default: all)",
    )
    parser.add_argument("--work", default="runs/walk", help="folder (default: runs/walk)")
    parser.add_argument(
        "--keep",
        metavar="COMMAND",
        help="do not run this one again, its results are in --work (default: none)",
    )
    args = parser.parse_args()

    folder = Path(args.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    link_scripts(folder)
    for number in args.write or PAGES:
        if args.keep is None:
            restart_from(number, folder)
        write_page(PAGES[number], folder, args.keep)


if __name__ == "__main__":
    main()
