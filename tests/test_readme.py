"""README: its figures are the committed ones, its commands and flags exist, its counts are true."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import bench_tiny_world as bench
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("vae.py", "prefix.py", "sft.py", "grpo.py", "rewards.py", "evaluate.py")
TUTORIAL_SCRIPTS = ("tutorials/tiny_world.py", "tutorials/reproduce.py", "tutorials/explore.py")


def test_the_table_of_the_tiny_world_is_the_measured_one():
    measured = json.loads((ROOT / "tests" / "tiny_world.json").read_text())
    shown = README.split(bench.START)[1].split(bench.END)[0].strip()
    assert bench.page(measured["figures"], measured["note"]) == shown


def test_the_line_counts_are_about_true():
    counts = dict(re.findall(r"\| `(\w+\.py)` \| ([\d,]+) \|", README))
    assert set(counts) == set(SCRIPTS)
    for name, text in counts.items():
        stated = int(text.replace(",", ""))
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(stated - lines) <= 0.05 * lines, f"{name} has {lines} lines: see wc -l *.py"


def imports_of(path):
    """The modules that a file imports at its top, as a reader meets them."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_each_file_stands_above_all_that_it_imports():
    """The house of shared/design.md, from the ground floor up."""
    floors = [("vae", "rewards"), ("prefix",), ("sft",), ("evaluate",), ("grpo",)]
    ours = {name for floor in floors for name in floor}
    below = set()
    for floor in floors:
        for name in floor:
            above = (imports_of(ROOT / f"{name}.py") & ours) - below
            assert not above, f"{name}.py imports {above}, which stand beside or above it"
        below.update(floor)


def test_the_six_files_know_the_worlds_by_one_table_alone():
    """Nothing but rewards.WORLDS names them in code; docstrings and help may show commands."""
    for script in SCRIPTS:
        tree = ast.parse((ROOT / script).read_text())
        names = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in ("tiny", "tiny-vl"):
                names.append(node.lineno)
            if isinstance(node, ast.ImportFrom) and node.module in ("tiny_world", "drawn_scenes"):
                names.append(node.lineno)
        allowed = 3 if script == "rewards.py" else 0  # DEFAULT_WORLD and the two keys of WORLDS
        assert len(names) == allowed, f"{script}, lines {names}"


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(p.name for p in ROOT.glob("tutorials/*.md"))]
)
def test_every_link_of_a_page_leads_somewhere(page):
    path = ROOT / page if page == "README.md" else ROOT / "tutorials" / page
    # code has brackets of its own
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        exists = target.startswith("http") or (path.parent / target).exists()
        assert exists, f"{page}: {target}"


def test_every_script_of_the_readme_exists():
    scripts = set(re.findall(r"python (\S+\.py)", README))
    assert len(scripts) >= 5
    for script in scripts:
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("script", [*SCRIPTS, *TUTORIAL_SCRIPTS])
def test_every_flag_of_the_readme_is_one_of_its_script(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = re.findall(r"--[a-z][a-z-]*", known)
    for line in README.replace("\\\n", " ").splitlines():
        is_command = line.strip().startswith(("python", "torchrun")) and f" {script}" in line
        if not is_command:
            continue
        arguments = line.split(script, 1)[1].split("#")[0]
        for flag in re.findall(r"--[a-z][a-z-]*", arguments):
            assert flag in flags, (script, flag)
