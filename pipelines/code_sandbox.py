"""What does a program do that a model wrote? Nobody knows, so it runs shut in.

A separate process in namespaces of its own (see `jail`): no network, a read-only root without the user's files, a small
folder to write in, limits on processors, memory, files and processes, an empty environment, a wall clock after which
everything in there is killed. Where the machine allows no namespaces, Landlock and a filter of system calls stand in
for them; where it allows neither, nothing is run.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from pipelines.jail import REFUSED
from tidar_core.errors import ConfigError

__all__ = ["Limits", "Outcome", "isolation", "run_program"]

FIRST_UID, UIDS = 1 << 20, 1 << 30
"""Users of programs, another one each time: nobody's files, and nobody else's share of processes."""
ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
DRIVER = """
import os, sys
token = sys.argv.pop()
exec(compile(sys.stdin.read(), "program.py", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(1, b"\\n" + token.encode() + b" passed")
"""
"""A program has passed when its last statement is behind it: one that exits before its tests has not."""
TOLD_BYTES = 400
"""Of what a failed program said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """By the wall clock; also of processor time."""
    memory_bytes: int = 2**30
    """Of each process's address space."""
    file_bytes: int = 2**24
    """Of one file, and of what is printed."""
    folder_bytes: int = 2**26
    """Of all files together; they lie in memory."""
    processes: int = 8
    """Threads counted."""
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """It ran to its end, every assertion included."""
    reason: str
    """`passed`, `timed out`, or how it ended and its last words."""


def isolation() -> str:
    """What programs are shut in by on this machine, in words. Raises ConfigError where they cannot be."""
    if _fence_needed():
        return "Landlock and a filter of system calls, no namespaces, our user without privileges, resource limits"
    kinds = "mount, pid, network, ipc and uts" if os.getuid() == 0 else "user, mount, pid, network, ipc and uts"
    user = "a user of its own" if os.getuid() == 0 else "our user without privileges"
    return f"{kinds} namespaces, read-only root, {user}, resource limits"


def run_program(source: str, limits: Limits | None = None, *, readable: Sequence[str] = ()) -> Outcome:
    """Run Python source to its end, with this interpreter and its packages.

    readable  folders that the program may read besides
    """
    return _run(source, limits or Limits(), readable, fence=_fence_needed())


@cache
def _fence_needed() -> bool:
    """Whether this machine allows the fence alone. Raises ConfigError where it allows nothing."""
    outcome = _run("import os\nassert os.getpid() == 2", Limits(), (), fence=False)
    if outcome.passed:
        return False
    fenced = _run("pass", Limits(), (), fence=True)
    if fenced.passed:
        return True
    raise ConfigError(
        f"programs of a model cannot be shut in on this machine ({outcome.reason}; {fenced.reason}); none is run: run "
        "as root, or allow user namespaces (Linux 5.12) or Landlock (5.13), or leave allow_code_execution off"
    )


def _run(source: str, limits: Limits, readable: Sequence[str], *, fence: bool) -> Outcome:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tidar-jail-") as root, tempfile.TemporaryFile() as output:
        settings = {
            "token": token,
            "fence": fence,
            "root": root,
            "uid": FIRST_UID + secrets.randbelow(UIDS),
            "readable": [*dict.fromkeys([sys.prefix, sys.base_prefix, *readable])],
            "folder_bytes": limits.folder_bytes,
            "environment": ENVIRONMENT,
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_CPU": max(1, round(limits.seconds)),
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
            },
        }
        jail = [sys.executable, "-I", "-S", str(Path(__file__).with_name("jail.py")), json.dumps(settings)]
        program = [sys.executable, "-I", "-B", "-c", DRIVER, token]
        process = subprocess.Popen(
            [*jail, *program], stdin=subprocess.PIPE, stdout=output, stderr=output, env={}, start_new_session=True
        )
        try:
            process.communicate(source.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # all that is in there dies with it
                process.wait()
        return _outcome(process.returncode, _last_words(output), token)


def _outcome(code: int, said: str, token: str) -> Outcome:
    words, _, verdict = said.rpartition(token)
    if code == 0 and verdict == " passed":
        return Outcome(True, "passed")
    if code == REFUSED and verdict.startswith(" refused"):
        return Outcome(False, verdict.strip())
    ended = f"killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    last = (words or verdict).strip().splitlines()[-1:]
    return Outcome(False, ": ".join((ended, *last)))


def _last_words(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - TOLD_BYTES))
    return output.read().decode(errors="replace")
