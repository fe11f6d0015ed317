"""The README's figures are those of the committed JSON, its commands exist, and its line counts are true."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench_tiny_world as bench

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_the_tiny_world_is_the_measured_one():
    measured = json.loads((ROOT / "tests" / "tiny_world.json").read_text())
    assert bench.page(measured["figures"], measured["note"]) == README.split(bench.START)[1].split(bench.END)[0].strip()


def test_the_line_counts_are_about_true():
    counts = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert set(counts) == {path.name for path in ROOT.glob("*.py")}
    for name, lines in counts.items():
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 0.1 * int(lines), f"{name}: see wc -l *.py"


def test_the_rl_loop_stays_short():
    """A file that reads as the algorithm can be held in the head, and so can a function of any file."""
    assert len((ROOT / "grpo.py").read_text().splitlines()) < 450
    for path in ROOT.glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60, path.name


def test_every_link_of_the_pages_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "tutorials").glob("*.md")):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)            # code has brackets of its own
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_script_of_the_readme_exists():
    scripts = set(re.findall(r"python (\S+\.py)", README))
    assert len(scripts) >= 5 and all((ROOT / script).is_file() for script in scripts), scripts


@pytest.mark.parametrize("script", ["vae.py", "prefix.py", "sft.py", "grpo.py", "rewards.py", "evaluate.py"])
def test_every_flag_of_the_readme_is_one_of_its_script(script):
    known = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True).stdout
    commands = [line for line in README.replace("\\\n", " ").splitlines() if f" {script}" in line and line.strip().startswith(("python", "torchrun"))]
    for command in commands:
        for flag in re.findall(r"--[a-z][a-z-]*", command.split(script, 1)[1].split("#")[0]):
            assert flag in re.findall(r"--[a-z][a-z-]*", known), (script, flag)
