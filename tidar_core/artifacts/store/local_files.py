"""Which files lie below a folder of this machine, links followed?

A link to a file is that file, under the link's name. A link to a folder is that folder; where it leads back to a folder
above itself it is passed over, since all of that is listed already. A link that leads nowhere is refused by name.
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
"""The name of a file relative to the folder that is searched; its size and times."""


def files_of_folder(folder: str, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[File]:
    """The files below `folder` whose names fit one of `patterns`, in any order; what is hidden is passed over."""
    _refuse_dangling(folder)
    return _files_below(
        folder,
        wanted=lambda name: matches(name.rpartition("/")[2], patterns),
        left_out=lambda name: is_hidden(name) or is_left_out(name, exclude),
    )


def files_of_glob(folder: str, pattern: re.Pattern[str], depth: int | None, exclude: Sequence[str]) -> Iterator[File]:
    """The files below `folder` whose whole path fits `pattern`, in any order.

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
    """wanted    whether a file of that relative name is asked for
    left_out  whether a file or folder of that plain name is passed over, with all below it
    """
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", folder, (os.path.realpath(folder),))]
    while pending:
        prefix, path, above = pending.pop()
        for entry in _entries(path, is_root=not prefix):
            name = prefix + entry.name
            if left_out(entry.name):
                continue
            found = _followed(entry, asked=wanted(name) or _may_be_folder(entry.name))
            if found is None:
                continue
            if S_ISDIR(found.st_mode):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real not in above and (depth is None or len(above) < depth):
                    pending.append((f"{name}/", entry.path, (*above, real)))
            elif S_ISREG(found.st_mode) and wanted(name):
                yield name, found


def _refuse_dangling(path: str) -> None:
    """Raise UserError if `path` is a link that leads nowhere."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a link to {os.readlink(path)}, where nothing lies; mend the link, or remove it")


def _entries(path: str, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        if is_root:  # nothing was ever there
            return []
        raise


def _followed(entry: os.DirEntry[str], *, asked: bool) -> os.stat_result | None:
    """What an entry leads to; None for a link to nothing that was not asked for."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not entry.is_symlink():
            raise
        if asked:
            _refuse_dangling(entry.path)
        return None


def _may_be_folder(name: str) -> bool:
    """Whether a link to nothing may have been one to a folder: its name has no suffix, as in `data` or `v1.0`."""
    return not PurePosixPath(name).suffix[1:2].isalpha()
