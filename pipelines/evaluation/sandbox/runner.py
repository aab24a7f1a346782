"""Run programs that a model wrote in a sandbox, because their behaviour is unknown.

A program runs in a separate process in its own namespaces (see `namespaces`). It has no network, a read-only root
without the user's files, a small folder to write in, and an empty environment. Processors, memory, files and processes
are limited. After a timeout everything in the sandbox is killed. If the machine allows no namespaces, Landlock and a
filter of system calls replace them; if it allows neither, nothing is run.
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

from pipelines.evaluation.sandbox.namespaces import REFUSED
from tidar_core.errors import ConfigError

__all__ = ["Limits", "Outcome", "isolation", "run_program"]

FIRST_UID, UIDS = 1 << 20, 1 << 30
"""User ids of programs, another id each time: it owns no files, and shares its process limit with no other."""
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
def keep(secret, verdict):
    import ctypes, os
    c = ctypes.CDLL(None)
    c.strdup.restype, c.strdup.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    c.on_exit.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    os.dup2(verdict, 0)
    os.close(verdict)
    if c.on_exit(ctypes.cast(c.dprintf, ctypes.c_void_p), c.strdup(secret)):
        raise OSError("on_exit")
def main():
    import sys
    secret, source = sys.stdin.buffer.readline().strip(), sys.stdin.buffer.read()
    keep(secret, int(sys.argv.pop()))
    del secret, sys
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except:
        try:
            import sys
            sys.excepthook(*sys.exc_info())
        finally:
            leave = "os._exit"
            leave(1)
import os
bound = tuple(os._exit if value == "os._exit" else value for value in main.__code__.co_consts)
main.__code__ = main.__code__.replace(co_consts=bound)
del bound, os
main()
"""
"""Program that runs a model's program, which passes if it reaches its end; exiting before its tests is a failure.

The verdict is a secret that the C library writes when the process ends with status 0. `on_exit` calls `dprintf` with
the status, which is the file descriptor of a pipe, and the secret. Once the program begins, no Python object holds the
secret. Every exception of the program, `SystemExit` included, ends in `os._exit(1)`, which calls no handler. This
function is a constant of the driver's code, so a program cannot replace it by binding a name. A program that knows all
this could still use native code, such as `ctypes`, and trace functions.
"""
VERDICT_BYTES = 4096
LAST_BYTES = 400
"""Bytes kept of the last output of a failed program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resources that a program may use."""

    seconds: float = 10.0
    """Limit of wall-clock time, and of processor time."""
    memory_bytes: int = 2**30
    """Address space of each process."""
    file_bytes: int = 2**24
    """Size of one file, and of the output."""
    folder_bytes: int = 2**26
    """Size of all files together; they lie in memory."""
    files: int = 4096
    """Number of files and folders together."""
    processes: int = 8
    """Number of processes and threads."""
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a program."""

    passed: bool
    """Whether it ran to its end, every assertion included."""
    reason: str
    """`passed`, `timed out`, or its exit code or signal and its last line of output."""


def isolation() -> str:
    """Isolation of programs on this machine, in words. Raises ConfigError if it allows no isolation."""
    if _landlock_needed():
        return "Landlock and a filter of system calls, no namespaces, our user without privileges, resource limits"
    kinds = "mount, pid, network, ipc and uts" if os.getuid() == 0 else "user, mount, pid, network, ipc and uts"
    user = "a user of its own" if os.getuid() == 0 else "our user without privileges"
    return f"{kinds} namespaces, read-only root, a filter of system calls, {user}, resource limits"


def run_program(source: str, limits: Limits | None = None, *, readable: Sequence[str] = ()) -> Outcome:
    """Run Python source to its end, with this interpreter and its packages.

    readable  further folders that the program may read
    """
    return _run(source, limits or Limits(), readable, landlock=_landlock_needed())


@cache
def _landlock_needed() -> bool:
    """Whether this machine allows Landlock but no namespaces. Raises ConfigError if it allows neither."""
    outcome = _run("import os\nassert os.getpid() == 2", Limits(), (), landlock=False)
    if outcome.passed:
        return False
    under_landlock = _run("pass", Limits(), (), landlock=True)
    if under_landlock.passed:
        return True
    raise ConfigError(
        f"programs of a model cannot be isolated on this machine ({outcome.reason}; {under_landlock.reason}); none is "
        "run: run as root, or allow user namespaces (Linux 5.12) or Landlock (5.13), or leave allow_code_execution off"
    )


def _run(source: str, limits: Limits, readable: Sequence[str], *, landlock: bool) -> Outcome:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tidar-sandbox-") as root, tempfile.TemporaryFile() as output:
        settings = {
            "token": token,  # marks a refusal; the program never sees it
            "landlock": landlock,
            "root": root,
            "uid": FIRST_UID + secrets.randbelow(UIDS),
            "readable": [*dict.fromkeys([sys.prefix, sys.base_prefix, *readable])],
            "folder_bytes": limits.folder_bytes,
            "files": limits.files,
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
        sandbox = [sys.executable, "-I", "-S", str(Path(__file__).with_name("namespaces.py")), json.dumps(settings)]
        verdict, end = os.pipe()
        os.set_blocking(verdict, False)
        program = [sys.executable, "-I", "-B", "-c", DRIVER, str(end)]
        process = subprocess.Popen(
            [*sandbox, *program], stdin=subprocess.PIPE, stdout=output, stderr=output, env={}, pass_fds=[end],
            start_new_session=True,
        )  # fmt: skip
        os.close(end)
        secret = secrets.token_hex(16).encode()
        try:
            process.communicate(secret + b"\n" + source.encode(), timeout=limits.seconds)
            printed = _last_output(output).replace(secret.decode(), "")  # status 1 is a file descriptor too
            return _outcome(process.returncode, printed, token, _passed(verdict, secret))
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # everything in the sandbox dies with it
                process.wait()
            os.close(verdict)


def _passed(verdict: int, secret: bytes) -> bool:
    """Whether the pipe holds only the secret, once for each process that reached its end."""
    try:
        written = os.read(verdict, VERDICT_BYTES)
    except BlockingIOError:  # a process of the program still runs and has written nothing
        return False
    return bool(written) and not written.replace(secret, b"")


def _outcome(code: int, printed: str, token: str, passed: bool) -> Outcome:
    words, _, verdict = printed.rpartition(token)
    if code == 0 and passed:
        return Outcome(True, "passed")
    if code == REFUSED and verdict.startswith(" refused"):
        return Outcome(False, verdict.strip())
    ended = f"killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    last = (words or verdict).strip().splitlines()[-1:]
    return Outcome(False, ": ".join((ended, *last)))


def _last_output(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - LAST_BYTES))
    return output.read().decode(errors="replace")
