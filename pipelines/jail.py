"""Shut this process in, then become another program: run by path, as the first process of a sandbox.

    python -I -S jail.py SETTINGS COMMAND...

Own mount, pid, network, ipc and host-name namespaces (as root), and a user namespace where we are not root. The root is
an empty tmpfs with the interpreter and the system's libraries bound into it, all of it read-only but a small /tmp;
there is no /proc, no network interface, no host process. When this process dies, everything in the sandbox dies.

The standard library alone: nothing of the project can be imported from in here.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from pathlib import Path
from typing import Any

REFUSED = 125
"""Exit code when the sandbox could not be built; nothing was run."""

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

libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any], command: list[str]) -> int:
    """Build the sandbox, run `command` in it, and give its exit code; 128 and the signal's number if one killed it."""
    _call("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
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
        os.execve(command[0], command, settings["environment"])
    while (ended := os.wait())[0] != program:
        pass
    os._exit(_code(ended[1]))


def _unshare(uid: int) -> int:
    """New namespaces; gives the user that the program is to be: `uid`, or ourselves where only that can be."""
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
    """A root of our own: what is bound into it is read-only, /tmp is small, and the old root is gone."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = settings["root"]
    _mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={settings['folder_bytes']},mode=1777")
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
    """Drop every privilege for good: what is not root anywhere keeps none over execve."""
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
    except (OSError, KeyError, ValueError) as error:  # also in the processes that were forked: none may go on
        os.write(2, f"{given['token']} refused: {error}\n".encode())
        os._exit(REFUSED)
