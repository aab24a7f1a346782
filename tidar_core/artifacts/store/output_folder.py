"""The atomic replacement of output folders: a folder that a job makes appears whole or not at all.

A folder of this project is complete if its marker file exists (manifest.json, tidar.json, report.json). It is written
under another name beside its place, `.NAME.xxxx`, and renamed at the end, so that a reader never reads a half-written
folder. An older folder is moved to `.NAME.xxxx.old` first and removed last. `finish_swap` completes a swap that was
interrupted between the two, or undoes it if the new folder is not whole.

An output that is a link to a folder is followed: the folder changes, the link stays.
"""

import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from tidar_core.artifacts.store import locations
from tidar_core.errors import StorageError, UserError

__all__ = [
    "KEY_LEN",
    "REPLACING",
    "finish_swap",
    "marked",
    "put_in_place",
    "read_mark",
    "refuse_stranger",
    "remove_other_work",
    "require_writable",
    "staged_folder",
    "work_folder",
    "write_mark",
]

T = TypeVar("T")

REPLACING = ".replacing"
"""File in a folder on an object store while its files are replaced; it names the folder of the new files."""
OLD = ".old"
KEY_LEN = 16
"""Characters of a job's identity in the name of its work folder."""
STAGED_LEN = 8
"""Random characters in the name of a staged folder; a later job cannot go on with it."""


def work_folder(uri: str, key: str) -> str:
    """A hidden folder beside `uri`; every process that can reach `uri` can write in it."""
    uri = locations.followed(uri)
    return locations.join(uri.rpartition("/")[0], f".{locations.name_of(uri)}.{key}")


def marked(uri: str, kind: type[T], work: Callable[[], T]) -> T:
    """The outcome in the mark at `uri`; if there is no mark, the outcome of the work, written there as the mark.

    Every file that a mark names exists, because files appear whole or not at all and the mark comes last.

    kind  dataclass of the outcome
    """
    if locations.exists(uri):
        return read_mark(uri, kind)
    outcome = work()
    write_mark(uri, outcome)
    return outcome


def read_mark(uri: str, kind: type[T]) -> T:
    """The outcome in a mark. Raises StorageError if it is damaged.

    kind  dataclass of the outcome
    """
    try:
        return TypeAdapter(kind).validate_python(locations.read_json(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is damaged; remove it, and start the job again") from error


def write_mark(uri: str, outcome: Any) -> None:
    """Write a dataclass as a mark."""
    locations.write_json(uri, to_jsonable_python(outcome))


def remove_other_work(uri: str, own: str) -> None:
    """Remove the work folders of other jobs that were killed before they completed the output at `uri`.

    own  work folder of the job that writes the output now, named by `KEY_LEN` characters of its identity
    """
    _remove_beside(uri, KEY_LEN, but=locations.name_of(own))


def require_writable(uri: str) -> None:
    """Raises StorageError if no file could be written at `uri` on this disk; leaves nothing behind."""
    path = locations.local_path(locations.followed(uri))
    if path is not None:
        existing = next(folder for folder in path.parents if folder.exists())
        with locations.in_one_line(uri), tempfile.TemporaryFile(dir=existing):
            pass


@contextmanager
def staged_folder(uri: str, marker: str) -> Iterator[str]:
    """A folder beside `uri` to write in; it becomes `uri` at the end, or is removed after an exception.

    Folders of writers that were killed are removed first. No other job may be writing at `uri`.
    """
    finish_swap(uri, marker)
    refuse_stranger(uri, marker)
    _remove_beside(uri, STAGED_LEN)
    staged = work_folder(uri, secrets.token_hex(STAGED_LEN // 2))
    try:
        with locations.in_one_line(uri):
            yield staged
        put_in_place(staged, uri, marker)
    finally:
        locations.remove(staged)


def refuse_stranger(uri: str, marker: str) -> None:
    """Raises UserError if a file or folder at `uri` is neither empty nor contains the file `marker`."""
    if any(locations.exists(place) for place in (locations.join(uri, marker), locations.join(uri, REPLACING))):
        return
    path = locations.local_path(uri)
    with locations.in_one_line(uri):
        if locations.exists(uri) and (path is None or not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{uri} exists and holds no {marker}, so it was not made by this command; "
                "remove it or give another output folder"
            )


def put_in_place(staged: str, uri: str, marker: str) -> None:
    """Makes the folder `staged` become `uri`, and removes the older folder there.

    staged  a `work_folder` of `uri`, or a folder directly in one
    marker  the file whose presence means that a folder is whole
    """
    uri = locations.followed(uri)
    assert locations.exists(locations.join(staged, marker)), f"{marker} was not written"
    refuse_stranger(uri, marker)
    if locations.local_path(uri) is None:
        _replace_remote(staged, uri, marker)
    else:
        with locations.in_one_line(uri):
            _replace_local(Path(staged), Path(uri))


def finish_swap(uri: str, marker: str) -> None:
    """Completes or undoes an interrupted swap at `uri`. No other job may be writing there."""
    uri = locations.followed(uri)
    if locations.local_path(uri) is None:
        if locations.exists(locations.join(uri, REPLACING)):
            staged = locations.read_json(locations.join(uri, REPLACING))["by"]
            if locations.exists(locations.join(staged, marker)):
                _replace_remote(staged, uri, marker)
                locations.remove(staged)
        return
    parent, name = uri.rpartition("/")[0], locations.name_of(uri)
    pattern = re.compile(re.escape(f".{name}.") + r"[0-9a-f]+" + re.escape(OLD))
    for old in sorted(filter(pattern.fullmatch, locations.names_in(parent or "/"))):
        with locations.in_one_line(uri):
            _finish_local(Path(parent or "/") / old, Path(uri), marker)


def _remove_beside(uri: str, key_len: int, but: str = "") -> None:
    """Removes the hidden folders beside `uri` whose names end with a key of `key_len` characters, except `but`."""
    uri = locations.followed(uri)
    parent, name = uri.rpartition("/")[0] or "/", locations.name_of(uri)
    pattern = re.compile(re.escape(f".{name}.") + f"[0-9a-f]{{{key_len}}}")
    for found in locations.names_in(parent):
        if pattern.fullmatch(found) and found != but:
            locations.remove(locations.join(parent, found))


def _replace_local(staged: Path, target: Path) -> None:
    for path in staged.rglob(".*"):  # unfinished files of a killed writer
        path.unlink()
    if not target.exists():
        staged.rename(target)
        return
    work = staged if staged.parent == target.parent else staged.parent
    old = work.with_name(work.name + OLD)
    target.rename(old)
    staged.rename(target)
    shutil.rmtree(old)


def _finish_local(old: Path, target: Path, marker: str) -> None:
    if not target.exists():
        work = old.with_name(old.name.removesuffix(OLD))
        staged = [path.parent for path in (work / marker, *work.glob(f"*/{marker}")) if path.exists()]
        (staged[0] if staged else old).rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _replace_remote(staged: str, target: str, marker: str) -> None:
    """Replaces a folder on an object store, which has no rename.

    The old marker is removed first and the new marker is written last; in between, the file REPLACING exists.
    """
    locations.write_json(locations.join(target, REPLACING), {"by": staged})
    locations.remove(locations.join(target, marker))
    for entry in locations.list_files(target):
        locations.remove(entry.uri)
    names = [entry.name for entry in locations.list_files(staged) if entry.name != marker]
    for copied in filter(None, (names, [marker])):
        locations.copy_files(*([locations.join(folder, name) for name in copied] for folder in (staged, target)))
    locations.remove(locations.join(target, REPLACING))
