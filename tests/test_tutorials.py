"""The tutorials cannot rot: every bash block that is followed by an output block is run, and must print exactly that."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [(page, commands, output) for page in sorted((ROOT / "tutorials").glob("*.md"))
          for commands, output in re.findall(r"```bash\n(.*?)```\s*```output\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("page, commands, output", BLOCKS, ids=[f"{page.stem}-{i}" for i, (page, _, _) in enumerate(BLOCKS)])
def test_commands_print_what_the_page_shows(page, commands, output):
    printed = ""
    for command in commands.strip().splitlines():
        assert command.startswith("python "), command
        done = subprocess.run(["bash", "-c", f"{sys.executable} {command.removeprefix('python ')}"], cwd=ROOT, capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert printed == output
