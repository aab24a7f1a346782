"""Access to files at a location: a local path or an object store.

Where do files lie, and how are they read and written there?

A location is a URI: a local path, file:// or s3://. Object stores take their credentials and endpoint from the usual
environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, ...). A file://
URI is percent-encoded, as RFC 8089 requires; a path and an s3:// URI are taken literally.
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import fsspec
from fsspec.utils import glob_translate

from tidar_core.artifacts.store.cache import cache_folder
from tidar_core.artifacts.store.file_names import is_hidden, is_left_out, matches
from tidar_core.artifacts.store.json_object import parsed
from tidar_core.artifacts.store.local_files import files_of_folder, files_of_glob
from tidar_core.errors import StorageError, UserError

__all__ = [
    "FileEntry",
    "absolute",
    "canonical_json",
    "copy_files",
    "create_bytes",
    "exists",
    "followed",
    "in_one_line",
    "is_glob",
    "join",
    "list_files",
    "local_copy",
    "local_folder",
    "local_path",
    "name_of",
    "names_in",
    "open_random",
    "open_read",
    "open_write",
    "read_bytes",
    "read_json",
    "read_text",
    "remove",
    "sha256",
    "size",
    "upload_folder",
    "write_bytes",
    "write_json",
]

SCHEMES = ("s3",)
CHUNK_BYTES = 2**22
GLOB_SIGNS = "*?["
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file in a listing."""

    uri: str
    name: str
    """Path relative to the listed folder."""
    size: int
    version: str
    """Mark that changes when the file does: ETag on an object store, modification time in nanoseconds locally."""


def local_path(uri: str) -> Path | None:
    """The path of a local location; None on an object store."""
    if uri.startswith("file:/"):
        return Path(unquote(_path_of_file_uri(uri), errors="surrogateescape"))
    return None if "://" in uri else Path(uri).expanduser()


def absolute(uri: str) -> str:
    """The same location independent of the working folder, without a trailing slash."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path.absolute())


def followed(uri: str) -> str:
    """The absolute location after following links on this disk; it need not exist."""
    path = local_path(uri)
    return absolute(uri) if path is None else os.path.realpath(path)


def join(uri: str, *parts: str) -> str:
    """The location of `parts` below `uri`."""
    return "/".join((_plain(uri).rstrip("/"), *parts))


def name_of(uri: str) -> str:
    """The last part of a location."""
    return _plain(uri).rstrip("/").rsplit("/", 1)[-1]


def is_glob(uri: str) -> bool:
    """Whether the location is a pattern. The location of an existing file with such signs in its name is no pattern."""
    return any(sign in _path(uri) for sign in GLOB_SIGNS) and not exists(uri)


def canonical_json(value: Any) -> str:
    """The canonical text of a JSON value, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def exists(uri: str) -> bool:
    """Whether a file or a folder exists at `uri`; an object store has no empty folders."""
    with in_one_line(uri):
        path = local_path(uri)
        return bool(_filesystem(uri).exists(_path(uri))) if path is None else path.exists()


def names_in(uri: str) -> list[str]:
    """Names of files and folders directly in the folder at `uri`, hidden or not; empty if there is no folder."""
    with in_one_line(uri):
        return [name_of(path) for path in _filesystem(uri).ls(_path(uri), detail=False)] if exists(uri) else []


def size(uri: str) -> int:
    """Size of the file at `uri`, in bytes."""
    with in_one_line(uri):
        return int(_filesystem(uri).size(_path(uri)))


def list_files(uri: str, patterns: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[FileEntry]:
    """The files at `uri`, in the order of their names; empty if nothing exists there.

    A folder is searched recursively for names that match one of `patterns`, also with .gz or .zst appended. Files and
    folders whose names begin with a dot are skipped. A file, or the matches of a glob, are taken as they are. A link
    counts as the file or folder that it leads to. Raises UserError for a broken link.

    exclude  patterns of file and folder names that are left out, with everything below such a folder
    """
    with in_one_line(uri):
        found = list(_remote_files(uri, patterns) if local_path(uri) is None else _local_files(uri, patterns, exclude))
    kept = [entry for entry in found if not any(is_left_out(part, exclude) for part in entry.name.split("/"))]
    return sorted(kept, key=lambda entry: entry.name)


def open_read(uri: str) -> IO[bytes]:
    """The file at `uri` from its beginning, without decompression."""
    with in_one_line(uri):
        stream = _filesystem(uri).open(_path(uri), "rb")
    return stream if local_path(uri) else io.BufferedReader(stream, 2**18)


def open_random(uri: str) -> IO[bytes]:
    """The file at `uri` for reads in any order: only requested bytes are fetched."""
    with in_one_line(uri):
        return _filesystem(uri).open(_path(uri), "rb", cache_type="none")


@contextmanager
def open_write(uri: str) -> Iterator[IO[bytes]]:
    """A new file at `uri`, folders included. It appears whole when closed; after an exception it does not appear."""
    with in_one_line(uri):
        if path := local_path(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                with unfinished.open("wb") as sink:
                    yield sink
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        else:
            upload = _filesystem(uri).open(_path(uri), "wb")
            try:
                yield upload
            except BaseException:
                upload.discard()
                upload.closed = True  # or its finaliser would upload the partial file
                raise
            upload.close()


def read_bytes(uri: str) -> bytes:
    """The whole content of the file at `uri`."""
    with in_one_line(uri):
        path = local_path(uri)
        return bytes(_filesystem(uri).cat_file(_path(uri))) if path is None else path.read_bytes()


def read_text(uri: str) -> str:
    """The whole text of the UTF-8 file at `uri`."""
    return read_bytes(uri).decode("utf-8")


def read_json(uri: str) -> Any:
    """The value in the JSON file at `uri`. Raises ValueError if it is not JSON."""
    return parsed(read_bytes(uri))


def write_bytes(uri: str, content: bytes) -> None:
    """Writes `content` into the file at `uri`."""
    with open_write(uri) as file:
        file.write(content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Writes `content` into a new file at `uri`; returns false, and writes nothing, if a file exists there.

    If two callers try at once, one succeeds, except on an object store without conditional writes.
    """
    try:
        if path := local_path(uri):
            with path.open("xb") as sink:
                sink.write(content)
        else:
            _filesystem(uri).pipe_file(_path(uri), content, mode="create")
    except OSError:
        if exists(uri):
            return False
        write_bytes(uri, content)
    return True


def write_json(uri: str, value: Any) -> None:
    """Writes `value` into the file at `uri` as indented JSON, for humans and programs."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove(uri: str) -> None:
    """Removes the file or the whole folder at `uri`, if it exists."""
    if exists(uri):
        with in_one_line(uri):
            _filesystem(uri).rm(_path(uri), recursive=True)


def sha256(uri: str) -> str:
    """SHA-256 of the bytes of the file at `uri`, in hexadecimal."""
    digest = hashlib.sha256()
    with in_one_line(uri), open_read(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def local_copy(uri: str, cache: str | Path | None = None) -> Path:
    """A local folder with the files of the folder at `uri`: the folder itself if local, else a download per version.

    cache  folder of downloads; this machine's `cache_folder` by default
    """
    path = local_path(uri)
    if path is not None:
        return path
    files = list_files(uri)
    key = hashlib.sha256(canonical_json([uri, [(f.name, f.size, f.version) for f in files]]).encode()).hexdigest()
    target = Path(cache or cache_folder()) / key[:32]
    if target.is_dir():
        return target
    staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        for file in files:
            copy = staged / file.name
            with in_one_line(uri), open_read(file.uri) as source, open_write(str(copy)) as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
        with suppress(OSError):  # another process was first
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


@contextmanager
def local_folder() -> Iterator[Path]:
    """A temporary local folder, removed when the context ends."""
    with tempfile.TemporaryDirectory(prefix="tidar-") as folder:
        yield Path(folder)


def copy_files(sources: Sequence[str], targets: Sequence[str]) -> None:
    """Copies files within one object store."""
    with in_one_line(targets[0]):
        _filesystem(targets[0]).copy([_path(uri) for uri in sources], [_path(uri) for uri in targets])


def upload_folder(folder: Path, uri: str) -> None:
    """Copies the files of a local folder below `uri`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as source, open_write(join(uri, *path.relative_to(folder).parts)) as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)


@contextmanager
def in_one_line(uri: str) -> Iterator[None]:
    """Raises StorageError, in one line, for an operation that an object store or a file system refuses."""
    try:
        yield
    except StorageError:
        raise
    except _refusals() as error:
        if local_path(uri) is None or not isinstance(error, OSError):
            reason = " ".join(str(error).split()) or type(error).__name__
            advice = "check the credentials, the endpoint and rights"
            raise StorageError(f"{uri} cannot be reached: {reason}; {advice}") from error
        if error.errno is None:  # a library's own error about damaged content of a file
            raise
        raise StorageError(f"{uri} cannot be read or written: {_refusal(error, uri)}") from error


def _refusal(error: OSError, uri: str) -> str:
    """The refusal of a file system, and advice."""
    where = f" ({error.filename})" if error.filename not in (None, _path(uri)) else ""
    reason = f"{os.strerror(error.errno or 0)}{where}"
    if error.errno in NO_ROOM:
        return f"{reason}; make room there, or give another place"
    if error.errno in NO_RIGHTS:
        return f"{reason}; check its rights, or give another place"
    return f"{reason}; check the path"


def _path_of_file_uri(uri: str) -> str:
    """The path of a file: URI, still percent-encoded."""
    path = uri.removeprefix("file:")
    if not path.startswith("//"):
        return path
    host, _, path = path.removeprefix("//").partition("/")
    if host not in ("", "localhost"):
        raise UserError(f"{uri} names the machine {host!r}; give file:///PATH with the whole path, or a local path")
    return f"/{path}"


def _plain(uri: str) -> str:
    """The location without percent-encoding."""
    return str(local_path(uri)) if uri.startswith("file:/") else uri


def _remote_files(uri: str, patterns: Sequence[str]) -> Iterator[FileEntry]:
    files, path = _filesystem(uri), _path(uri).rstrip("/")
    pattern = is_glob(uri)
    root = _above_signs(path) if pattern else path
    for full, info in (files.glob(path, detail=True) if pattern else files.find(path, detail=True)).items():
        if info["type"] == "file":
            name = full.removeprefix(root).lstrip("/") or name_of(full)
            if pattern or full == path or (not is_hidden(name) and matches(name_of(full), patterns)):
                yield FileEntry(f"{uri.partition('://')[0]}://{full}", name, int(info["size"]), _version(info))


def _local_files(uri: str, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[FileEntry]:
    path = _path(uri).rstrip("/") or "/"
    if is_glob(uri):
        root = _above_signs(path) or "/"
        levels = None if "**" in path else path.count("/") - root.rstrip("/").count("/")
        found = files_of_glob(root, re.compile(glob_translate(path)), levels, exclude)
    elif os.path.isfile(path):
        root, found = os.path.dirname(path), iter([(os.path.basename(path), os.stat(path))])
    else:
        root, found = path, files_of_folder(path, patterns, exclude)
    for name, known in found:
        version = str(round(known.st_mtime * 1e9))
        yield FileEntry(os.path.join(root, name), name, known.st_size, version)


def _above_signs(path: str) -> str:
    """The folder that contains everything that a pattern can match."""
    return re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]


def _filesystem(uri: str) -> Any:
    if local_path(uri) is not None:
        return fsspec.filesystem("file")
    scheme = uri.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{uri} has the scheme {scheme!r}; give a local path, file:// or s3://")
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _path(uri: str) -> str:
    path = local_path(uri)
    return uri.partition("://")[2] if path is None else str(path.absolute())


def _version(info: dict[str, Any]) -> str:
    return str(info["ETag"]).strip('"')


def _refusals() -> tuple[type[Exception], ...]:
    """Exceptions that local disks raise, and that an object store's client raises if it was loaded."""
    client = sys.modules.get("botocore.exceptions")
    return (OSError,) if client is None else (OSError, client.BotoCoreError)
