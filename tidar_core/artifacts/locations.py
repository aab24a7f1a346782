"""Where do things lie, and how are they read and written there?

A location is a URI: a local path, file:// or s3://. Object stores take their credentials and endpoint from the usual
environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, ...).

A folder of this project is complete when its marker file is there (manifest.json, tidar.json): it is written under
another name and put in place at the end, the marker last, so that a reader never takes a half-written one.
"""

import fnmatch
import gzip
import hashlib
import io
import json
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from tidar_core.artifacts.cache import cache_folder
from tidar_core.errors import UserError

__all__ = [
    "COMPRESSION_SUFFIXES",
    "FileEntry",
    "absolute",
    "broken_compression",
    "canonical_json",
    "exists",
    "join",
    "list_files",
    "local_copy",
    "local_folder",
    "local_path",
    "name_of",
    "names_in",
    "open_decompressed",
    "open_random",
    "open_read",
    "open_write",
    "put_in_place",
    "read_bytes",
    "read_json",
    "read_text",
    "refuse_stranger",
    "remove",
    "sha256",
    "size",
    "staged_folder",
    "upload_folder",
    "work_folder",
    "write_bytes",
    "write_json",
]

COMPRESSION_SUFFIXES = (".gz", ".zst")
SCHEMES = ("s3",)
CHUNK_BYTES = 2**22
REPLACING = ".replacing"  # in a folder on an object store while its files are exchanged: who was killed may go on


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a listing."""

    uri: str
    name: str
    """Path relative to the listed folder."""
    size: int
    version: str
    """Changes when the file does: ETag on an object store, modification time in nanoseconds locally."""


def local_path(uri: str) -> Path | None:
    """The path of a local location; None on an object store."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri).expanduser()


def absolute(uri: str) -> str:
    """The same location whatever the working folder, without a trailing slash."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """The location of `parts` below `uri`."""
    return "/".join((uri.rstrip("/"), *parts))


def name_of(uri: str) -> str:
    """The last part of a location."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def exists(uri: str) -> bool:
    """Whether a file or a folder that is not empty lies at `uri`."""
    with _in_one_line(uri):
        return bool(_filesystem(uri).exists(_path(uri)))


def names_in(uri: str) -> list[str]:
    """What lies directly in the folder at `uri`, hidden or not; nothing where there is none."""
    with _in_one_line(uri):
        return [name_of(path) for path in _filesystem(uri).ls(_path(uri), detail=False)] if exists(uri) else []


def size(uri: str) -> int:
    """Bytes of the file at `uri`."""
    with _in_one_line(uri):
        return int(_filesystem(uri).size(_path(uri)))


def list_files(uri: str, patterns: Sequence[str] = ("*",)) -> list[FileEntry]:
    """The files at `uri`, in the order of their names; empty when nothing is there.

    A folder is searched recursively for names that match one of `patterns`, also with .gz or .zst appended; names and
    folders that begin with a dot are passed over. A file, or what a glob matches, is taken as it is.
    """
    files, path = _filesystem(uri), _path(uri).rstrip("/")
    with _in_one_line(uri):
        is_glob = any(sign in path for sign in "*?[") and not files.exists(path)
        found = files.glob(path, detail=True) if is_glob else files.find(path, detail=True)
    root = path.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0] if is_glob else path
    entries = []
    for full, info in found.items():
        if info["type"] != "file":
            continue
        name = full.removeprefix(root).lstrip("/") or name_of(full)
        whole = is_glob or full == path
        if whole or (_matches(name_of(full), patterns) and not any(part.startswith(".") for part in name.split("/"))):
            entries.append(FileEntry(_uri(uri, full), name, int(info["size"]), _version(info)))
    return sorted(entries, key=lambda entry: entry.name)


def open_read(uri: str) -> IO[bytes]:
    """The file at `uri` from its beginning, as it lies there."""
    with _in_one_line(uri):
        stream = _filesystem(uri).open(_path(uri), "rb")
    return stream if local_path(uri) else io.BufferedReader(stream, 2**18)


def open_random(uri: str) -> IO[bytes]:
    """The file at `uri` for reads in any order: nothing is fetched that was not asked for."""
    with _in_one_line(uri):
        return _filesystem(uri).open(_path(uri), "rb", cache_type="none")


def open_decompressed(uri: str) -> IO[bytes]:
    """The file at `uri` from its beginning, decompressed if its name ends in .gz or .zst."""
    raw = open_read(uri)
    if uri.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if uri.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def broken_compression() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file raises."""
    return (gzip.BadGzipFile, EOFError, zlib.error, *_raised_by("zstandard", "ZstdError"))


@contextmanager
def open_write(uri: str) -> Iterator[IO[bytes]]:
    """A new file at `uri`, folders included. It appears when closed, whole; if an exception passes, not at all."""
    with _in_one_line(uri):
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
                upload.closed = True  # or its finaliser would upload what there is
                raise
            upload.close()


def read_bytes(uri: str) -> bytes:
    """All of the file at `uri`."""
    with _in_one_line(uri), open_read(uri) as file:
        return file.read()


def read_text(uri: str) -> str:
    """All of the UTF-8 file at `uri`."""
    return read_bytes(uri).decode("utf-8")


def read_json(uri: str) -> Any:
    """The value in the JSON file at `uri`. Raises ValueError when it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, content: bytes) -> None:
    """Put `content` into the file at `uri`."""
    with open_write(uri) as file:
        file.write(content)


def write_json(uri: str, value: Any) -> None:
    """Put `value` into the file at `uri`, for readers human and other."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove(uri: str) -> None:
    """Remove the file or the whole folder at `uri`, if there is one."""
    if exists(uri):
        with _in_one_line(uri):
            _filesystem(uri).rm(_path(uri), recursive=True)


def sha256(uri: str) -> str:
    """Hash of the bytes of the file at `uri`, in hexadecimal."""
    digest = hashlib.sha256()
    with _in_one_line(uri), open_read(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def local_copy(uri: str, cache: str | Path | None = None) -> Path:
    """A local folder with the files of the folder at `uri`: itself if local, else downloaded once per version.

    cache  where downloads lie; this machine's `cache_folder` by default
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
            copy.parent.mkdir(parents=True, exist_ok=True)
            with _in_one_line(uri), open_read(file.uri) as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
        with suppress(OSError):  # another process was first
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


@contextmanager
def local_folder() -> Iterator[Path]:
    """A temporary local folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tidar-") as folder:
        yield Path(folder)


def work_folder(uri: str, key: str) -> str:
    """A folder beside `uri`, hidden, that every process that can reach `uri` can write in."""
    uri = absolute(uri)
    return join(uri.rpartition("/")[0], f".{name_of(uri)}.{key}")


@contextmanager
def staged_folder(uri: str, marker: str) -> Iterator[str]:
    """A folder beside `uri` to write in; it becomes `uri` at the end, or vanishes if an exception passes."""
    refuse_stranger(uri, marker)
    staged = work_folder(uri, secrets.token_hex(4))
    try:
        yield staged
        put_in_place(staged, uri, marker)
    finally:
        remove(staged)


def refuse_stranger(uri: str, marker: str) -> None:
    """Raise UserError if something lies at `uri` that is neither empty nor has the file `marker`."""
    if not exists(uri) or exists(join(uri, marker)) or exists(join(uri, REPLACING)):
        return
    path = local_path(uri)
    if path is None or not path.is_dir() or any(path.iterdir()):
        raise UserError(
            f"{uri} exists and holds no {marker}, so it was not made by this command; "
            "remove it or give another output folder"
        )


def put_in_place(staged: str, uri: str, marker: str) -> None:
    """Let the folder `staged` become `uri`, in the place of what lies there. `marker` says that a folder is whole."""
    uri = absolute(uri)
    assert exists(join(staged, marker)), f"{marker} was not written"
    refuse_stranger(uri, marker)
    if local_path(uri) is None:
        _replace_remote(staged, uri, marker)
    else:
        _replace_local(Path(staged), Path(uri))


def upload_folder(folder: Path, uri: str) -> None:
    """Copy the files of a local folder below `uri`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as source, open_write(join(uri, *path.relative_to(folder).parts)) as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)


def _replace_local(staged: Path, target: Path) -> None:
    for path in staged.rglob(".*"):  # what a writer that was killed left
        path.unlink()
    if not target.exists():
        staged.rename(target)
        return
    old = staged.with_name(f"{staged.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    staged.rename(target)
    shutil.rmtree(old)


def _replace_remote(staged: str, target: str, marker: str) -> None:
    """Object stores have no rename: the old marker goes first and the new one comes last; REPLACING lies between."""
    write_json(join(target, REPLACING), {"by": staged})
    remove(join(target, marker))
    for entry in list_files(target):
        remove(entry.uri)
    names = [entry.name for entry in list_files(staged) if entry.name != marker]
    files = _filesystem(target)
    with _in_one_line(target):
        files.copy(*([_path(join(folder, name)) for name in names] for folder in (staged, target)))
        files.copy(_path(join(staged, marker)), _path(join(target, marker)))
    remove(join(target, REPLACING))


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


def _uri(like: str, path: str) -> str:
    return path if local_path(like) is not None else f"{like.partition('://')[0]}://{path}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    plain = next((name.removesuffix(suffix) for suffix in COMPRESSION_SUFFIXES if name.endswith(suffix)), name)
    return any(fnmatch.fnmatchcase(form, pattern) for pattern in patterns for form in (name, plain))


def _version(info: dict[str, Any]) -> str:
    return str(info.get("ETag", "")).strip('"') or str(round(info["mtime"] * 1e9))


@contextmanager
def _in_one_line(uri: str) -> Iterator[None]:
    """Say what an object store or file system refused, in one line."""
    refusal: type[OSError] = PermissionError if local_path(uri) else OSError
    try:
        yield
    except (refusal, *_raised_by("botocore.exceptions", "BotoCoreError")) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{uri} cannot be reached: {reason}; check the credentials, the endpoint and rights") from error


def _raised_by(module: str, name: str) -> tuple[type[Exception], ...]:
    """An exception of a library, or nothing while that library is not loaded: then it cannot have raised.

    So a machine that reads local files alone needs neither an object store's client nor every decompressor.
    """
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()
