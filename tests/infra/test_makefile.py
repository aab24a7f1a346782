"""The Makefile's commands, in environments of containers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = "import sys; print(sys.dont_write_bytecode)"


def test_processes_of_make_keep_compiled_modules_although_the_environment_turns_that_off():
    """Otherwise each of the many processes of a cluster compiles all that it imports."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # make runs the tests too
    found = subprocess.run(
        ["make", "--silent", "--eval", f"shown:; @{sys.executable} -c {SHOWN!r}", "shown"],
        cwd=ROOT, env=own | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "False"
