"""Which documents does a corpus hold, and in which order?

The order is that of the sources, then of the file names, and within a file that of its lines or rows. A text file is
one document; JSON lines and Parquet hold one in each row: a text under one field, or a conversation. Documents of no
characters are passed over.

Text is UTF-8 and is never repaired. A text file that is not UTF-8 is no document: it is passed over and said so. A
damaged file, a line that is not JSON, a row without its text or a document without end stops the job by name.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.conversations import CONVERSATION_FIELDS, conversation_of
from pipelines.jobs import Source
from tidar_core.artifacts import locations
from tidar_core.artifacts.locations import FileEntry
from tidar_core.errors import CorpusError

__all__ = ["Piece", "documents", "first_texts", "list_corpus", "work_units"]

ROWS_AT_ONCE = 128
READ_BYTES = 2**22
"""Of a Parquet column at once."""
FEWEST_BYTES = 2**16
"""Read from a file, at least, when a tokenizer is trained on the beginnings of all files."""
LONGEST_DOCUMENT = 2**27
"""Bytes of one document, at most: it is held in memory whole."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or the part of one whose lines begin in the bytes [start, stop)."""

    uri: str
    start: int
    stop: int
    whole: bool


def list_corpus(corpus: str, include: Sequence[str], exclude: Sequence[str] = ()) -> list[FileEntry]:
    """The files of a corpus in order. Raises CorpusError when there are none.

    exclude  patterns of file and folder names that are left out, with all that is below such a folder
    """
    listed = locations.list_files(locations.absolute(corpus), include)
    files = [entry for entry in listed if entry.size and not _left_out(entry.name, exclude)]
    if files:
        return files
    if not locations.exists(corpus) and not any(sign in corpus for sign in "*?["):
        raise CorpusError(f"corpus {corpus} does not exist; give a file, a folder or a glob")
    raise CorpusError(f"corpus {corpus} holds no text in files named {', '.join(include)}; check corpus and include")


def _left_out(name: str, exclude: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in exclude)


def work_units(files: Sequence[FileEntry], unit_bytes: int) -> list[list[Piece]]:
    """The corpus in order, in lists of about `unit_bytes`. Only plain JSON lines can be cut within a file."""
    units: list[list[Piece]] = [[]]
    room = unit_bytes
    for piece in (piece for file in files for piece in _pieces(file, unit_bytes)):
        if units[-1] and piece.stop - piece.start > room:
            units.append([])
            room = unit_bytes
        units[-1].append(piece)
        room -= piece.stop - piece.start
    return units


def documents(piece: Piece, source: Source, pass_over: Callable[[str], object]) -> Iterator[str]:
    """The texts of a piece in order, none empty. `pass_over` is told of each file that is no text.

    A conversation is given as the JSON that `pipelines.conversations` makes of it.
    """
    kind = _format(piece.uri)
    with _damage_named(piece.uri):
        if kind == ".jsonl":
            texts = _json_lines(piece, source)
        elif kind == ".parquet":
            texts = _parquet_rows(piece.uri, source)
        else:
            texts = _whole_file(piece.uri, source, pass_over)
        yield from (text for text in texts if text)


def first_texts(
    corpus: Sequence[tuple[FileEntry, Source]], max_bytes: int, taken: Callable[[str], bool]
) -> Iterator[str]:
    """Texts from the start of every file in turn, `max_bytes` in all, shared evenly as far as files reach.

    The last text taken from a file may be cut short.

    taken  whether a text may be read at all
    """
    left = max_bytes
    for ordinal, (file, source) in enumerate(corpus):
        share = min(max(left // (len(corpus) - ordinal), FEWEST_BYTES), left)
        for text in documents(Piece(file.uri, 0, file.size, whole=True), source, _ignore):
            if share <= 0:
                break
            if taken(text):
                begin = text.encode()[:share]
                yield begin.decode(errors="ignore")
                share -= len(begin)
                left -= len(begin)


def _pieces(file: FileEntry, unit_bytes: int) -> list[Piece]:
    if not file.uri.endswith(".jsonl") or file.size <= unit_bytes:
        return [Piece(file.uri, 0, file.size, whole=True)]
    starts = range(0, file.size, unit_bytes)
    return [Piece(file.uri, start, min(start + unit_bytes, file.size), whole=False) for start in starts]


def _format(uri: str) -> str:
    path = PurePosixPath(uri)
    return path.with_suffix("").suffix if path.suffix in locations.COMPRESSION_SUFFIXES else path.suffix


def _whole_file(uri: str, source: Source, pass_over: Callable[[str], object]) -> Iterator[str]:
    if source.documents == "conversations":
        raise CorpusError(f"{uri} is one text; conversations lie in JSON lines or Parquet: leave it out by include")
    with locations.open_decompressed(uri) as stream:
        content = stream.read(LONGEST_DOCUMENT + 1)
    _require_end(len(content), uri)
    try:
        yield content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        pass_over(uri)


def _json_lines(piece: Piece, source: Source) -> Iterator[str]:
    with locations.open_decompressed(piece.uri) as stream:
        position = 0
        if piece.start:  # the line that the byte before us is in belongs to the piece before us
            stream.seek(piece.start - 1)
            position = piece.start - 1 + len(_line(stream, piece.uri, piece.start - 1))
        while piece.whole or position < piece.stop:
            line = _line(stream, piece.uri, position)
            if not line:
                return
            if line.strip():
                try:
                    text = _document_of(_values(line), source)
                except ValueError as fault:
                    raise CorpusError(f"line {_line_number(piece.uri, position)} of {piece.uri} {fault}") from None
                yield text
            position += len(line)


def _line(stream: IO[bytes], uri: str, position: int) -> bytes:
    line = stream.readline(LONGEST_DOCUMENT + 1)
    if len(line) > LONGEST_DOCUMENT:
        _require_end(len(line), f"line {_line_number(uri, position)} of {uri}")
    return line


def _values(line: bytes) -> dict[str, Any]:
    """The object in a line. Raises ValueError with what is at fault."""
    try:
        values = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; convert the file") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}); each line must be one object") from None
    return values if isinstance(values, dict) else {}


def _document_of(values: dict[str, Any], source: Source) -> str:
    """The text of a row. Raises ValueError with what is at fault."""
    text = conversation_of(values) if source.documents == "conversations" else values.get(str(source.text_field))
    if not isinstance(text, str):
        raise ValueError(f"has no text under {source.text_field!r}; set text_field to the key that holds it")
    if not _is_unicode(text):
        raise ValueError("has half a surrogate pair, which no text can hold; repair it")
    return text


def _line_number(uri: str, position: int) -> int:
    """Counted only when a line is at fault: lines before that byte of the decompressed file, and this one."""
    number = 1
    with locations.open_decompressed(uri) as stream:
        while position > 0 and (chunk := stream.read(min(position, locations.CHUNK_BYTES))):
            number += chunk.count(b"\n")
            position -= len(chunk)
    return number


def _parquet_rows(uri: str, source: Source) -> Iterator[str]:
    fields = CONVERSATION_FIELDS if source.documents == "conversations" else (str(source.text_field),)
    with _seekable(uri) as stream:
        file = pq.ParquetFile(stream, buffer_size=READ_BYTES)
        columns = [name for name in file.schema_arrow.names if name in fields]
        _require_columns(uri, file.schema_arrow, columns, source)
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            for values in batch.to_pylist():
                row += 1
                try:
                    text = _document_of(values, source)
                except ValueError as fault:
                    raise CorpusError(f"row {row} of {uri} {fault}") from None
                _require_end(len(text), f"row {row} of {uri}")
                yield text


def _require_columns(uri: str, schema: pa.Schema, columns: list[str], source: Source) -> None:
    kinds = {name: schema.field(name).type for name in columns}
    if source.documents == "conversations":
        if not kinds:
            raise CorpusError(f"{uri} has no column of a conversation; it needs messages, or prompt and response")
    elif not any(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        for kind in kinds.values()
    ):
        names = ", ".join(schema.names)
        raise CorpusError(f"{uri} has no text column {source.text_field!r}; set text_field to one of {names}")


@contextmanager
def _seekable(uri: str) -> Iterator[IO[bytes]]:
    """The file at `uri` for reads in any order; a compressed one is laid out on this disk first."""
    if uri.endswith(".parquet"):
        with locations.open_random(uri) as stream:
            yield stream
    else:
        with locations.open_decompressed(uri) as packed, tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(packed, plain)
            yield plain


def _require_end(size: int, where: str) -> None:
    if size > LONGEST_DOCUMENT:
        raise CorpusError(f"{where} is longer than {LONGEST_DOCUMENT // 2**20} MiB; cut it into documents")


def _ignore(uri: str) -> None:
    """The actors that tokenize the file tell of it."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _damage_named(uri: str) -> Iterator[None]:
    try:
        yield
    except (*locations.broken_compression(), pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(f"{uri} is damaged ({reason}); fetch it again or leave it out by include") from error
