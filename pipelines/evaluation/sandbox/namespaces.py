"""Sandbox of this process, which then becomes another program. Run by path, as the first process of a sandbox.

    python -I -S namespaces.py SETTINGS COMMAND...

The sandbox has its own mount, pid, network, ipc and host-name namespaces, and a user namespace unless we are root. The
root is an empty tmpfs with the interpreter and the system's libraries bound into it. All of it is read-only except a
small /tmp. There is no /proc, no network interface and no host process. When this process dies, everything in the
sandbox dies.

A filter of system calls refuses actions that the namespaces would allow. These are further namespaces and mounts, keys,
tracing, and kinds of sockets that a network namespace does not separate. Memory that no limit counts is refused too:
System V segments, memory files, message queues.

If namespaces are not allowed, the setting `landlock` builds a weaker sandbox from features that every user has. Under
Landlock the same folders are readable and one small folder is writable. A stricter filter allows no socket, no other
process, no signal to another process, and no change of a file's owner, mode or times. It is weaker because the program
can see that other files exist. Also, its folder is checked a few times a second instead of being limited by the kernel.

Only the standard library is imported, because nothing of the project can be imported here.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

REFUSED = 125
"""Exit code if the sandbox could not be built; nothing was run."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID = 1, 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
PR_SET_SECUREBITS, SECURE_NO_ROOT = 28, 3
"""Bit that is final: over execve, root keeps no privilege."""
SECCOMP_KILL, SECCOMP_ERRNO, SECCOMP_ALLOW = 0x80000000, 0x50000, 0x7FFF0000
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_SET, BPF_RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16
"""Offsets in a filter's description of a call."""
X32 = 0x40000000
CLONE_THREAD = 0x10000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and the kernel's name."""
DENIED = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgctl": (71, 187),
    "semget": (64, 190), "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
"""System calls that are refused to every program: numbers on x86-64 and on ARM."""
SOCKET = (41, 198)
LANDLOCK_DENIED = {
    "socket": SOCKET, "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "fork": (57, None), "vfork": (58, None), "setsid": (112, 157), "setpgid": (109, 154), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
}  # fmt: skip
"""System calls that are refused as well in the sandbox without namespaces."""
SOCKET_FAMILIES = (1, 2, 10)
"""Families of sockets in a network namespace of its own: Unix, IPv4, IPv6. It does not
separate others, such as the host's VSOCK."""
CLONE_NEW = 0x7E020000
"""Flags of `clone` that create a namespace."""
CLONE, CLONE3, PRCTL = (56, 220), (435, 435), (157, 167)
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)
SYS_LANDLOCK = 444
"""landlock_create_ruleset; add_rule and restrict_self follow it."""
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of rights over files that Landlock has since each of its versions."""
CHECK_SECONDS = 0.02
"""Time between checks of the folder of a program without namespaces."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any], command: list[str]) -> int:
    """Build the sandbox, run `command` in it, and return its exit code; 128 + the signal that killed it."""
    _call("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    if settings["landlock"]:
        return _run_under_landlock(settings, command)
    uid = _unshare(settings["uid"])
    init = os.fork()  # the first process of the new pid namespace: when it dies, the kernel kills all others there
    if init:
        return _code(os.waitpid(init, 0)[1])
    _call("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    os.setsid()
    _enter_new_root(settings)
    program = os.fork()
    if not program:
        _limit(settings["limits"])
        _become(uid)
        _filter_calls(os.getpid(), landlock=False)
        os.execve(command[0], command, settings["environment"])
    while (ended := os.wait())[0] != program:
        pass
    os._exit(_code(ended[1]))


def _run_under_landlock(settings: dict[str, Any], command: list[str]) -> int:
    """Run `command` under Landlock, in the folder that would be its root, and return its exit code."""
    folder, parent = settings["root"], os.getpid()
    program = os.fork()
    if not program:
        _call("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(REFUSED)
        # processes are counted over all that our user runs, and the filter allows none anyway
        _limit({name: value for name, value in settings["limits"].items() if name != "RLIMIT_NPROC"})
        if os.getuid() == 0:
            _call("prctl", libc.prctl(PR_SET_SECUREBITS, SECURE_NO_ROOT))
        _call("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        os.chdir(folder)
        _landlock(folder, [*SYSTEM_FOLDERS, *settings["readable"]])
        _filter_calls(os.getpid(), landlock=True)
        os.execve(command[0], command, settings["environment"] | {"HOME": folder, "TMPDIR": folder})
    while (ended := os.waitpid(program, os.WNOHANG))[0] != program:
        if (excess := _excess(folder, settings["folder_bytes"], settings["files"])) is not None:
            os.kill(program, signal.SIGKILL)
            os.waitpid(program, 0)
            os.write(2, f"killed: {excess}\n".encode())
            return 128 + signal.SIGKILL
        time.sleep(CHECK_SECONDS)
    return _code(ended[1])


def _excess(folder: str, most_bytes: int, most_files: int) -> str | None:
    """The limit that the files of a program exceed, in words; None if they exceed no limit."""
    files = total = 0
    for path, folders, names in os.walk(folder):
        files += len(folders) + len(names)
        if files > most_files:
            return f"more than {most_files} files in its folder"
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:  # the file was removed meanwhile
                continue
    return f"more than {most_bytes} bytes in its folder" if total > most_bytes else None


def _landlock(folder: str, readable: list[str]) -> None:
    """Allow writes to `folder` only, and reads of `folder` and `readable` only, from now on."""
    version = libc.syscall(SYS_LANDLOCK, None, ctypes.c_size_t(0), 1)
    if version < 1:
        _call("landlock", version)
    handled = (1 << max(count for since, count in LANDLOCK_RIGHTS.items() if since <= version)) - 1
    attributes = ctypes.c_uint64(handled)
    rules = libc.syscall(SYS_LANDLOCK, ctypes.byref(attributes), ctypes.c_size_t(8), 0)
    if rules < 0:
        _call("landlock", rules)
    allowed = dict.fromkeys(readable, EXECUTE | READ_FILE | READ_DIR) | dict.fromkeys(DEVICES, READ_FILE | WRITE_FILE)
    for path, rights in (allowed | {folder: handled}).items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
            _call(f"landlock {path}", libc.syscall(SYS_LANDLOCK + 1, rules, 1, rule, 0))
            os.close(place)
    _call("landlock", libc.syscall(SYS_LANDLOCK + 2, rules, 0))
    os.close(rules)


def _filter_calls(own_pid: int, *, landlock: bool) -> None:
    """Refuse the calls above from now on; with `landlock`, also calls that name a process other than this one."""
    column, architecture = MACHINES[platform.machine()]
    refuse, allow = (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.EPERM), (BPF_RETURN, 0, 0, SECCOMP_ALLOW)
    lines = [(BPF_LOAD, 0, 0, ARCHITECTURE), (BPF_EQUAL, 1, 0, architecture), (BPF_RETURN, 0, 0, SECCOMP_KILL),
             (BPF_LOAD, 0, 0, NUMBER)]  # fmt: skip
    if platform.machine() == "x86_64":
        lines += [(BPF_AT_LEAST, 0, 1, X32), refuse]  # the same calls under other numbers
    for numbers in (DENIED | (LANDLOCK_DENIED if landlock else {})).values():
        if (number := numbers[column]) is not None:
            lines += [(BPF_EQUAL, 0, 1, number), refuse]
    # clone3 hides its flags from a filter; without it, clone is tried
    lines += [(BPF_EQUAL, 0, 1, CLONE3[column]), (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.ENOSYS)]
    lines += _landlock_lines(column, own_pid, refuse, allow) if landlock else _namespace_lines(column, refuse, allow)
    code = b"".join(struct.pack("=HBBI", *line) for line in [*lines, allow])
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(lines) + 1, ctypes.addressof(kept))
    _call("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


Line = tuple[int, int, int, int]
"""Line of a filter: operation, lines to skip if it holds, lines to skip if it does not, operand."""


def _landlock_lines(column: int, own_pid: int, refuse: Line, allow: Line) -> list[Line]:
    """Allow new threads but no new processes, and signals and limits for this process only."""
    lines: list[Line] = []
    for numbers, test, value in (
        (CLONE, BPF_SET, CLONE_THREAD),
        (KILL, BPF_EQUAL, own_pid),
        (TGKILL, BPF_EQUAL, own_pid),
    ):
        lines += [(BPF_EQUAL, 0, 4, numbers[column]), (BPF_LOAD, 0, 0, ARGUMENT_0), (test, 1, 0, value), refuse, allow]
    return [
        *lines, (BPF_EQUAL, 0, 5, PRLIMIT[column]), (BPF_LOAD, 0, 0, ARGUMENT_0), (BPF_EQUAL, 2, 0, 0),
        (BPF_EQUAL, 1, 0, own_pid), refuse, allow,
        (BPF_EQUAL, 0, 3, PRCTL[column]), (BPF_LOAD, 0, 0, ARGUMENT_0), (BPF_EQUAL, 0, 1, PR_SET_PDEATHSIG),
        refuse,
    ]  # fmt: skip


def _namespace_lines(column: int, refuse: Line, allow: Line) -> list[Line]:
    """Allow new processes without further namespaces, and sockets of few families."""
    families = [(BPF_EQUAL, len(SOCKET_FAMILIES) - index, 0, family) for index, family in enumerate(SOCKET_FAMILIES)]
    return [
        (BPF_EQUAL, 0, 4, CLONE[column]), (BPF_LOAD, 0, 0, ARGUMENT_0), (BPF_SET, 0, 1, CLONE_NEW), refuse, allow,
        (BPF_EQUAL, 0, len(families) + 3, SOCKET[column]), (BPF_LOAD, 0, 0, ARGUMENT_0), *families, refuse, allow,
    ]  # fmt: skip


def _unshare(uid: int) -> int:
    """Create the namespaces; returns the user id of the program: `uid`, or our own if we are not root."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", libc.unshare(flags))
        return uid
    _call("unshare", libc.unshare(flags | CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return user


def _enter_new_root(settings: dict[str, Any]) -> None:
    """Enter a new root: bound folders are read-only, /tmp is small, and the old root is gone."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = settings["root"]
    _mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,nr_inodes=1k,mode=755")
    os.mkdir(f"{root}/tmp")
    sizes = f"size={settings['folder_bytes']},nr_inodes={settings['files']},mode=1777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, sizes)
    for folder in (*SYSTEM_FOLDERS, *settings["readable"]):
        target = root + folder
        if os.path.islink(folder):  # /bin -> usr/bin
            os.symlink(os.readlink(folder), target)
        elif os.path.isdir(folder) and not os.path.exists(target):
            os.makedirs(target)
            _mount(folder, target, None, MS_BIND | MS_REC)
    os.mkdir(f"{root}/dev")
    for device in DEVICES:
        Path(root + device).touch()
        _mount(device, root + device, None, MS_BIND)
    _mount_attributes(root, AT_RECURSIVE, add=ATTR_RDONLY | ATTR_NOSUID)
    _mount_attributes(f"{root}/tmp", 0, remove=ATTR_RDONLY)
    os.chdir(root)
    _call("pivot_root", libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    _call("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _become(uid: int) -> None:
    """Drop every privilege for good: a process that is not root keeps no privilege over execve."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _mount_attributes(path: str, flags: int, *, add: int = 0, remove: int = 0) -> None:
    wanted = _MountAttributes(add, remove, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    given = AT_FDCWD, os.fsencode(path), flags, ctypes.byref(wanted), size
    _call("mount_setattr", libc.syscall(SYS_MOUNT_SETATTR, *given))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    given = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _call(f"mount {target}", libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]))


def _call(what: str, outcome: int) -> None:
    if outcome != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        sys.exit(main(given, sys.argv[2:]))
    except (OSError, KeyError, ValueError) as error:  # in forked processes too, which must not go on
        os.write(2, f"{given['token']} refused: {error}\n".encode())
        os._exit(REFUSED)
