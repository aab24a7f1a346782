"""The search for files below a folder of this machine; links are followed.

A link to a file counts as the file, under the link's name. A link to a folder counts as the folder. A link back to a
folder above itself is skipped, since that folder's content is listed already. A link to a missing file is refused, with
its name.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from stat import S_ISDIR, S_ISREG

from tidar_core.artifacts.store.file_names import is_hidden, is_left_out, matches
from tidar_core.errors import UserError

__all__ = ["files_of_folder", "files_of_glob"]

File = tuple[str, os.stat_result]
"""Name of a file relative to the searched folder; its size and times."""


def files_of_folder(folder: str, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[File]:
    """The files below `folder` whose names match one of `patterns`, in any order; hidden files are skipped."""
    _refuse_dangling(folder)
    return _files_below(
        folder,
        wanted=lambda name: matches(name.rpartition("/")[2], patterns),
        left_out=lambda name: is_hidden(name) or is_left_out(name, exclude),
    )


def files_of_glob(folder: str, pattern: re.Pattern[str], depth: int | None, exclude: Sequence[str]) -> Iterator[File]:
    """The files below `folder` whose whole path matches `pattern`, in any order.

    depth  levels of folders that are searched; None: all
    """
    return _files_below(
        folder,
        wanted=lambda name: pattern.fullmatch(os.path.join(folder, name)) is not None,
        left_out=lambda name: is_left_out(name, exclude),
        depth=depth,
    )


def _files_below(
    folder: str, *, wanted: Callable[[str], bool], left_out: Callable[[str], bool], depth: int | None = None
) -> Iterator[File]:
    """wanted    whether a file with that relative name is requested
    left_out  whether a file or folder with that plain name is skipped, with all below it
    """
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", folder, (os.path.realpath(folder),))]
    while pending:
        prefix, path, above = pending.pop()
        for entry in _entries(path, is_root=not prefix):
            name = prefix + entry.name
            if left_out(entry.name):
                continue
            found = _followed(entry, required=wanted(name) or _may_be_folder(entry.name))
            if found is None:
                continue
            if S_ISDIR(found.st_mode):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real not in above and (depth is None or len(above) < depth):
                    pending.append((f"{name}/", entry.path, (*above, real)))
            elif S_ISREG(found.st_mode) and wanted(name):
                yield name, found


def _refuse_dangling(path: str) -> None:
    """Raises UserError if `path` is a link to a missing file or folder."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist; repair the link, or remove it")


def _entries(path: str, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        if is_root:  # the searched folder does not exist: it has no files
            return []
        raise


def _followed(entry: os.DirEntry[str], *, required: bool) -> os.stat_result | None:
    """Status of the file or folder that an entry leads to; None for a broken link that is not required."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not entry.is_symlink():
            raise
        if required:
            _refuse_dangling(entry.path)
        return None


def _may_be_folder(name: str) -> bool:
    """Whether a broken link may have led to a folder: its name has no suffix, as in `data` or `v1.0`."""
    return not PurePosixPath(name).suffix[1:2].isalpha()
