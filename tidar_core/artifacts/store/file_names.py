"""The rules of file names: format, compression, and patterns that select or exclude files.

The case of suffixes does not matter: A.TXT.GZ is a gzipped .txt.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

__all__ = ["compression_of", "format_of", "is_hidden", "is_left_out", "matches"]

COMPRESSION_SUFFIXES = (".gz", ".zst")


def compression_of(name: str) -> str:
    """The suffix `.gz` or `.zst`; empty if the file is not compressed."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in COMPRESSION_SUFFIXES else ""


def format_of(name: str) -> str:
    """The suffix in lower case, without a compression's suffix: `.jsonl` for A.JSONL.gz; empty if there is none."""
    return PurePosixPath(_plain(name)).suffix.lower()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name matches one of the patterns, as it is or without a compression's suffix."""
    return any(_fits(form, pattern) for pattern in patterns for form in (name, _plain(name)))


def is_left_out(name: str, exclude: Sequence[str]) -> bool:
    """Whether the name of a file or of a folder matches one of the patterns."""
    return any(_fits(name, pattern) for pattern in exclude)


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def _plain(name: str) -> str:
    return name[: len(name) - len(compression_of(name))]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(_lowered(name), _lowered(pattern))


def _lowered(name: str) -> str:
    """The name with its suffixes in lower case."""
    stem, dot, suffixes = name.partition(".")
    return stem + dot + suffixes.lower()
