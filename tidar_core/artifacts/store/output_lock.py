"""The lock of an output: a second job that would write it is refused, with the holder's name.

Which job writes an output now?

The lock is a file beside the output, `.NAME.lock`, with the host and process of the job. On a disk the operating system
holds the lock (flock), so it ends with its process, even if that is killed. This is true of a shared file system too,
if it passes locks on.

Object stores and a few file systems have no such locks. There the holder renews its file every RENEW_SECONDS. A job
that finds the file takes it over at once if its process was on this host and has ended. Otherwise the job waits, and
takes the file over if it is not renewed for LEASE_SECONDS. If two jobs begin in the same instant, one is refused if the
store has conditional writes, as S3 and MinIO have. If two jobs take over within SETTLE_SECONDS, one is refused on any
store. A holder that was halted for longer than the lease has lost its lock without notice.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_folder import finish_swap, refuse_stranger, work_folder
from tidar_core.errors import StorageError, UserError

__all__ = ["output_lock"]

RENEW_SECONDS = 10.0
LEASE_SECONDS = 45.0
SETTLE_SECONDS = 1.0
LOOK_SECONDS = 0.5
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def output_lock(uri: str, marker: str) -> Iterator[None]:
    """Holds the lock of the output at `uri`. Raises UserError while another job holds it.

    An interrupted swap of the output is finished first: under the lock no other job can be writing it. Then a file or
    folder at `uri` that this kind of job did not make is refused, before any work is done for it.

    marker  the file whose presence means that the output is whole
    """
    place = work_folder(uri, "lock")
    path = locations.local_path(place)
    with ExitStack() as held:
        if path is None or (lock := _lock_on_disk(path, uri)) is None:
            held.enter_context(_lease(place, uri))
        else:
            held.callback(_release, lock, path)
        finish_swap(uri, marker)
        refuse_stranger(uri, marker)
        yield


def _lock_on_disk(path: Path, uri: str) -> int | None:
    """A descriptor that holds the lock as long as it is open; None on a file system without locks."""
    with locations.in_one_line(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(lock, path):  # else the earlier holder removed the file that was opened
                    os.ftruncate(lock, 0)
                    os.write(lock, _stated(_holder()))
                    return lock
                os.close(lock)
            except OSError as error:
                content = os.pread(lock, 2**12, 0)
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    raise _refusal(uri, content) from None
                if error.errno in WITHOUT_LOCKS:
                    return None
                raise


def _release(lock: int, path: Path) -> None:
    path.unlink(missing_ok=True)  # before the lock is released, so that no other job can hold this file
    os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(lock), path.stat())


@contextmanager
def _lease(place: str, uri: str) -> Iterator[None]:
    """Holds the lock through a file at `place` that is renewed."""
    holder = _holder()
    if not locations.create_bytes(place, _stated(holder)):
        _take_over(place, uri, holder)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(place, holder, ended), daemon=True, name="output lock")
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(UserError):  # an error of the job itself takes precedence
            if _is_ours(_read(place), holder):
                locations.remove(place)


def _take_over(place: str, uri: str, holder: dict[str, Any]) -> None:
    """Writes `holder` into a lock whose earlier holder has ended. Raises UserError if that is still running."""
    first = _read(place)
    end = time.monotonic() + LEASE_SECONDS
    while not _has_ended(first) and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if (now := _read(place)) not in (first, b""):
            raise _refusal(uri, now)
    locations.write_bytes(place, _stated(holder))
    time.sleep(SETTLE_SECONDS)
    if not _is_ours(now := _read(place), holder):
        raise _refusal(uri, now)


def _renew(place: str, holder: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with suppress(UserError):  # a store that does not answer now may do so before the lease is over
            if not _is_ours(_read(place), holder):
                return
            locations.write_bytes(place, _stated(holder))


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "job": secrets.token_hex(8)}


def _stated(holder: dict[str, Any]) -> bytes:
    """The content of a lock file; different bytes each time."""
    return json.dumps(holder | {"renewed": _now(), "mark": secrets.token_hex(4)}).encode()


def _read(place: str) -> bytes:
    """The content of the lock file; empty if there is no file."""
    try:
        return locations.read_bytes(place)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return b""
        raise


def _parsed(content: bytes) -> dict[str, Any]:
    """The holder that a lock file names; empty while the file is being written."""
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}


def _is_ours(content: bytes, holder: dict[str, Any]) -> bool:
    return _parsed(content).get("job") == holder["job"]


def _has_ended(content: bytes) -> bool:
    """Whether the holder was a process of this host that has ended, or has released the lock."""
    found = _parsed(content)
    if found.get("host") != socket.gethostname():
        return not content
    try:
        os.kill(int(found["pid"]), 0)
    except OSError as error:  # other errors mean that it runs, and this process may not signal it
        return error.errno == errno.ESRCH
    return False


def _refusal(uri: str, content: bytes) -> UserError:
    found = _parsed(content)
    known = f"process {found['pid']} on {found['host']}, since {found['since']}" if found else "it has just begun"
    return UserError(f"another job writes {uri} now ({known}); wait until it ends, stop it, or give another output")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
