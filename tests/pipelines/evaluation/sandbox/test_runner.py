"""The sandbox lets a program compute, and stops it from everything else."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.evaluation.sandbox.namespaces import CLONE, CLONE3, DENIED, MACHINES
from pipelines.evaluation.sandbox.runner import FIRST_UID, UIDS, Limits, isolation, run_program
from tidar_core.errors import ConfigError

ROOT = Path(__file__).parents[4]
SHORT = Limits(seconds=2, processes=8)


@pytest.fixture(autouse=True)
def sandbox():
    try:
        if isolation().startswith("Landlock"):
            pytest.skip("no namespaces are allowed here; their replacement is tested in test_namespaces")
    except ConfigError as error:
        pytest.skip(str(error))


def left_over():
    """Processes of programs that are still there."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            uid = int(status.read_text().split("Uid:")[1].split()[0])
        except OSError:  # it ended while we looked
            continue
        if FIRST_UID <= uid < FIRST_UID + UIDS:
            found.append(status.parent.name)
    return found


def nothing_is_left():
    deadline = time.monotonic() + 60
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left_over()


def test_a_program_passes_when_its_last_assertion_is_behind_it():
    assert run_program("import math, tempfile\nassert math.gcd(12, 18) == 6\nprint('fine')").reason == "passed"
    failed = run_program("def f(): return 3\nassert f() == 4, 'f is 3'")
    assert (failed.passed, failed.reason) == (False, "ended with exit code 1: AssertionError: f is 3")


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        ("import sys; sys.exit(0)", "ended with exit code 1: SystemExit: 0"),
        ("import os; os._exit(0)", "ended with exit code 0"),
        ("raise SystemExit", "ended with exit code 1: SystemExit"),
        ("import os; os.execv('/bin/true', ['true'])", "ended with exit code 0"),
    ],
)
def test_a_program_that_leaves_before_its_assertions_has_not_passed(leave, reason):
    assert run_program(f"{leave}\nassert 1 == 2").reason == reason


FORGERIES = {
    "frames": """
import gc, os, re, sys
seen, frame = [], sys._getframe()
while frame:
    seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
    frame = frame.f_back
text = repr(seen) + repr(sys.argv) + repr(sys.orig_argv) + repr(os.environ) + repr(gc.get_objects())
secrets = set(re.findall("(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text))
for fd in range(64):
    for secret in ["", *secrets]:
        for words in (secret, secret + " passed", "passed"):
            try:
                os.write(fd, b"\\n" + words.encode())
                os.write(fd, words.encode())
            except OSError:
                pass
os._exit(0)
""",
    "standard input": """
import os, sys
os.write(0, (sys.stdin.read() + str(os.read(0, 99))).encode())
os._exit(0)
""",
    "names": """
import builtins, os, sys
class Leave(BaseException):
    pass
builtins.SystemExit = builtins.RuntimeError = builtins.BaseException = Leave
os._exit = lambda code: None
sys.excepthook = lambda *_: sys.exit(0)
builtins.__import__ = lambda *_: sys.exit(0)
sys.exit(0)
""",
    "two processes": "import os\nif os.fork():\n    os.wait()\n    os._exit(0)\nraise SystemExit(0)",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_program_cannot_reach_the_verdict(forgery):
    assert not run_program(f"{FORGERIES[forgery]}\nassert 1 == 2").passed


def test_a_program_whose_children_come_to_their_ends_too_passes():
    assert run_program("import os\nif os.fork():\n    os.wait()\nassert 1 == 1").passed


def test_a_crash_and_broken_source_are_failures_with_a_reason():
    assert run_program("import ctypes; ctypes.string_at(0)").reason.startswith("killed by signal 11")
    assert "SyntaxError" in run_program("def f(:\n").reason


def test_an_endless_loop_is_killed_at_its_time():
    assert run_program("while True: pass", Limits(seconds=1)).reason == "timed out after 1 s"
    began = time.monotonic()
    assert run_program("import time; time.sleep(60)", Limits(seconds=0.5)).reason == "timed out after 0.5 s"
    assert time.monotonic() - began < 50
    assert nothing_is_left()


def test_ten_gigabytes_are_refused():
    assert run_program("held = bytearray(10 * 2**30)").reason == "ended with exit code 1: MemoryError"


COUNTED_FORKS = """
import os, time
forked = 0
try:
    while forked < 50:
        if os.fork() == 0:
            time.sleep(60)
        forked += 1
except OSError as refused:
    print(refused)
assert 1 <= forked <= 8, forked
"""


def test_a_fork_bomb_meets_the_limit_and_dies_with_the_sandbox():
    counted = run_program(COUNTED_FORKS, Limits(processes=SHORT.processes))
    assert counted.passed, counted.reason  # else the bomb below would not be safe to light
    assert nothing_is_left()
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run_program(bomb, SHORT).reason == "timed out after 2 s"
    assert nothing_is_left()


def test_a_process_that_would_outlive_its_program_dies_with_it():
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)"
    assert run_program(daemon).passed
    assert nothing_is_left()


def test_nothing_outside_is_written_or_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    (tmp_path / "secret").write_text("hush")
    tried = [tmp_path / "new", tmp_path / "secret", ROOT / "written", Path.home() / "written", "/usr/written",
             "/written", "/dev/written", f"{sys.prefix}/written"]  # fmt: skip
    mine = f"/tmp/{tmp_path.parent.name}-{os.getpid()}"
    outcome = run_program(f"""
import os
for path in {[str(path) for path in tried]}:
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError(path)
for path in {[str(path) for path in (tmp_path, ROOT / "tidar", ROOT / "tests", "/proc/1")]}:
    assert not os.path.exists(path), path
assert "hush" not in str(os.environ)
open({mine!r}, "w").write("may be written")
""")
    assert outcome.passed, outcome.reason
    assert (tmp_path / "secret").read_text() == "hush"
    assert not any(Path(path).exists() for path in tried if Path(path) != tmp_path / "secret")
    assert not Path(mine).exists()


def test_a_full_folder_and_endless_words_stop_at_their_limits():
    small = Limits(folder_bytes=2**20, file_bytes=2**18)
    filled = run_program("for n in range(100):\n    open(f'/tmp/{n}', 'wb').write(bytes(2**17))", small)
    assert "No space left on device" in filled.reason
    assert "File too large" in run_program("open('/tmp/a', 'wb').write(bytes(2**19))", small).reason
    assert run_program("while True: print('x' * 4096)", small).reason.startswith("ended with exit code 1: xxx")


def test_more_files_than_the_limit_are_refused():
    few = Limits(files=100)
    made = "made = 0\nwhile made < 200:\n    open(f'/tmp/{made}', 'w').close()\n    made += 1"
    assert run_program(made, few).reason.startswith("ended with exit code 1: OSError: [Errno 28] No space left")
    links = "import os\nfor n in range(200):\n    os.symlink('/', f'/tmp/{n}')"
    assert "No space left on device" in run_program(links, few).reason
    assert run_program("import os\nfor n in range(50):\n    os.mkdir(f'/tmp/{n}')", few).passed


REFUSED_CALLS = {
    "shared memory that no limit counts": ("shmget", 0, 2**20, 0o1600),
    "a file in memory": ("memfd_create", b"held", 0),
    "a user namespace": ("unshare", 0x10000000),
    "a mount namespace": ("unshare", 0x20000),
    "a mount": ("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "a message queue": ("mq_open", b"/held", 0o102, 0o600, None),
    "a key": ("add_key", b"user", b"held", b"x", 1, -3),
    "a trace": ("ptrace", 0, 0, 0, 0),
}


@pytest.mark.parametrize("what", REFUSED_CALLS)
def test_what_no_limit_and_no_namespace_holds_is_refused_by_the_filter_of_system_calls(what):
    name, *arguments = REFUSED_CALLS[what]
    number = DENIED[name][MACHINES[platform.machine()][0]]
    source = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
found = libc.syscall({number}, *{arguments!r})
assert (found, ctypes.get_errno()) == (-1, errno.EPERM), (found, ctypes.get_errno())
"""
    assert run_program(source).reason == "passed"


def test_a_child_in_namespaces_of_its_own_is_not_made_and_a_plain_child_is():
    column = MACHINES[platform.machine()][0]
    cloned = """
import ctypes, errno, os, signal
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x40000000):
    assert libc.syscall({clone}, flags | signal.SIGCHLD, 0, 0, 0, 0) == -1
    assert ctypes.get_errno() == errno.EPERM
assert libc.syscall({clone3}, None, 0) == -1
if not (child := os.fork()):
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""
    assert run_program(cloned.format(clone=CLONE[column], clone3=CLONE3[column])).reason == "passed"


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_NETLINK", "AF_PACKET", "AF_ALG"])
def test_sockets_of_the_host_s_own_kinds_are_refused(family):
    assert "Operation not permitted" in run_program(f"import socket; socket.socket(socket.{family})").reason
    assert run_program("import asyncio\nasyncio.run(asyncio.sleep(0))").reason == "passed"


def test_no_socket_reaches_anyone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        server.accept()[0].close()
        server.settimeout(0.1)
        outcome = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        assert "Network is unreachable" in outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_program_can_kill_nobody_but_itself():
    parent = os.getppid()
    outcome = run_program(f"""
import os, signal
for pid in (1, os.getppid(), {os.getpid()}, {parent}, -1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
""")
    assert outcome.passed, outcome.reason
    assert os.getppid() == parent


def unprivileged(*command):
    if os.getuid() != 0 or not shutil.which("unshare"):
        pytest.skip("becoming another user takes root and util-linux")
    done = subprocess.run(["unshare", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode and "unshare failed" in done.stderr:
        pytest.skip(done.stderr.strip())
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_user_without_privileges_gets_the_same_sandbox_from_a_user_namespace():
    code = """
from pipelines.evaluation.sandbox.runner import Limits, isolation, run_program
print(isolation())
print(run_program("import socket; socket.create_connection(('127.0.0.1', 9))").reason)
print(run_program("open('/usr/written', 'w')").reason)
print(run_program("import os; os.setuid(0)").reason)
"""
    reasons = unprivileged("--map-user=1000", "--map-group=1000", sys.executable, "-B", "-c", code).splitlines()
    assert reasons[0].startswith("user, mount, pid, network, ipc and uts namespaces")
    assert [reason.split("] ")[1].split(":")[0] for reason in reasons[1:]] == [
        "Network is unreachable", "Read-only file system", "Invalid argument",  # the last: there is no root in there
    ]  # fmt: skip
