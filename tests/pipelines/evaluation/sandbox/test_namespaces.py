"""A machine without namespaces: Landlock and a filter of system calls stop a program."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.evaluation.sandbox import namespaces
from pipelines.evaluation.sandbox.namespaces import DENIED, LANDLOCK_DENIED, MACHINES, SYS_LANDLOCK

ROOT = Path(__file__).parents[4]
HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
"""Linux headers below /usr/include; ARM shares the table of numbers with all newer machines."""
FORBID = """
import ctypes, json, os, struct, sys
lines = [(0x20, 0, 0, 0)]  # load the number of the call
for number in json.loads(sys.argv[1]):
    lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]  # it is this one: not permitted
code = b"".join(struct.pack("=HBBI", *line) for line in [*lines, (0x06, 0, 0, 0x7FFF0000)])
kept, libc = ctypes.create_string_buffer(code, len(code)), ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("@HP", len(lines) + 1, ctypes.addressof(kept)), 0, 0) == 0
"""
RUN = """
from pipelines.evaluation.sandbox.runner import Limits, isolation, run_program
reasons = [isolation()]
for source in json.load(sys.stdin):
    limits = Limits(seconds=2) if source == "while True: pass" else Limits()
    reasons.append(run_program(source, limits).reason)
print(json.dumps(reasons))
"""


def where_forbidden(calls, programs):
    """The reasons why programs failed in a process that may not make those system calls."""
    numbers = [number[MACHINES[platform.machine()][0]] for number in calls]
    command = [sys.executable, "-B", "-c", FORBID + RUN, json.dumps(numbers)]
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": "hush"}
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(programs), env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1]]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", autouse=True)
def landlock():
    reason = where_forbidden([DENIED["unshare"]], [])[0]
    if "cannot be isolated" in reason:
        pytest.skip(reason)
    assert reason.startswith("Landlock and a filter of system calls, no namespaces")


@pytest.mark.slow
def test_a_program_without_namespaces_reads_and_writes_only_its_own_folder_and_starts_and_signals_nobody(tmp_path):
    (tmp_path / "secret").write_text("hush")
    mode = (tmp_path / "secret").stat().st_mode
    outside = [str(path) for path in (tmp_path / "new", tmp_path / "secret", ROOT / "written", "/tmp/written-outside",
                                      f"{sys.prefix}/written", "/usr/written")]  # fmt: skip
    denied = {
        "import socket; socket.socket()": 1,
        "import socket; socket.socketpair()": 1,
        "import os; os.fork()": 1,
        "import os\nwhile True:\n    os.fork()": 1,
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])": 1,
        "import os; os.setsid()": 1,
        f"import os; os.kill({os.getpid()}, 9)": 1,
        "import os; os.kill(os.getppid(), 9)": 1,
        "import os; os.kill(0, 9)": 1,
        "import os; os.kill(-1, 9)": 1,
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))": 1,
        f"import os; os.chmod({outside[1]!r}, 0o777)": 1,
        f"import os; os.utime({outside[1]!r})": 1,
        f"import os; os.truncate({outside[1]!r}, 0)": 1,
        f"open({outside[1]!r}).read()": 13,
        f"import os; os.remove({outside[1]!r})": 13,
        "open('/proc/self/environ').read()": 13,
        **{f"open({path!r}, 'w')": 13 for path in outside},
    }
    _, *reasons = where_forbidden([DENIED["unshare"]], list(denied))
    for reason, (source, number) in zip(reasons, denied.items(), strict=True):
        assert f"[Errno {number}]" in reason, (source, reason)
    assert ((tmp_path / "secret").read_text(), (tmp_path / "secret").stat().st_mode) == ("hush", mode)
    assert [path for path in outside if Path(path).exists()] == [outside[1]]


LAST_WILL = "import ctypes; assert ctypes.CDLL(None).prctl(1, 0) == -1"
"""A program could outlive its parent only if the kernel no longer signalled the parent's death."""


ENDLESS = """
n = 0
while True:
    with open(str(n), "wb") as file:
        file.write(bytes({size}))
    n += 1
"""
MEMORY_FILE = "import ctypes; assert ctypes.CDLL(None).memfd_create(b'held', 0) >= 0"


@pytest.mark.slow
def test_an_honest_program_passes_without_namespaces_and_a_greedy_one_meets_its_limits():
    honest = [
        "import math, tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'a')\nopen('b', 'w').close()",
        "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()",
        "import os\nassert not any('hush' in value for value in os.environ.values())",
        LAST_WILL,
    ]
    greedy = {
        "held = bytearray(10 * 2**30)": "ended with exit code 1: MemoryError",
        "while True: pass": "timed out after 2 s",
        "open('a', 'wb').write(bytes(2**25))": "ended with exit code 1: OSError: [Errno 27] File too large",
        "import os; os.abort()": "killed by signal 6",
        "import sys; sys.exit(0)": "ended with exit code 1: SystemExit: 0",
        MEMORY_FILE: "ended with exit code 1: AssertionError",
        ENDLESS.format(size=0): "killed by signal 9: killed: more than 4096 files in its folder",
        ENDLESS.format(size=2**23): "killed by signal 9: killed: more than 67108864 bytes in its folder",
        "assert 1 == 2, 'no'": "ended with exit code 1: AssertionError: no",
    }
    _, *reasons = where_forbidden([DENIED["unshare"]], [*honest, *greedy])
    assert reasons == ["passed"] * len(honest) + list(greedy.values())


def test_where_neither_namespaces_nor_landlock_are_allowed_nothing_is_run():
    (reason,) = where_forbidden([DENIED["unshare"], (SYS_LANDLOCK, SYS_LANDLOCK)], ["open('/tmp/never', 'w')"])
    assert "programs of a model cannot be isolated on this machine (refused: [Errno 1] unshare: " in reason
    assert "refused: [Errno 1] landlock: Operation not permitted); none is run" in reason


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_the_kernel_s_on_each_machine(machine):
    header = Path("/usr/include") / HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"no {header}; it is in linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    kernel = {name: int(number) for name, number in found}
    others = {"clone": namespaces.CLONE,
              "clone3": namespaces.CLONE3, "prctl": namespaces.PRCTL, "kill": namespaces.KILL,
              "tgkill": namespaces.TGKILL, "prlimit64": namespaces.PRLIMIT,
              "landlock_create_ruleset": (SYS_LANDLOCK,) * 2,
              "pivot_root": tuple(namespaces.SYS_PIVOT_ROOT[machine] for machine in HEADERS)}  # fmt: skip
    ours = {name: numbers[MACHINES[machine][0]] for name, numbers in (DENIED | LANDLOCK_DENIED | others).items()}
    newer = {"fchmodat2", "setxattrat", "removexattrat"}  # than the oldest headers that we build with
    for name, number in ours.items():
        assert kernel.get(name) == number or (name in newer and name not in kernel), name
    assert len(ours) > 75
