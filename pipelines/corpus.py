"""Which documents does a corpus hold, and in which order?

The order is that of the file names, and within a file that of its lines or rows. A text file is one document; JSON
lines and Parquet hold one in each row, under one field. Documents of no characters are passed over.

Text is UTF-8 and is never repaired. A text file that is not UTF-8 is no document: it is passed over and said so. A
damaged file, a line that is not JSON or a row without its text stops the job by name.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from tidar_core.artifacts import locations
from tidar_core.artifacts.locations import FileEntry
from tidar_core.errors import CorpusError

__all__ = ["Piece", "documents", "first_texts", "list_corpus", "split_of", "work_units"]

ROWS_AT_ONCE = 1024
FEWEST_BYTES = 2**16
"""Read from a file, at least, when a tokenizer is trained on the beginnings of all files."""


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


def documents(piece: Piece, text_field: str, pass_over: Callable[[str], object]) -> Iterator[str]:
    """The texts of a piece in order, none empty. `pass_over` is told of each file that is no text."""
    kind = _format(piece.uri)
    with _damage_named(piece.uri):
        if kind == ".jsonl":
            texts = _json_lines(piece, text_field)
        elif kind == ".parquet":
            texts = _parquet_rows(piece.uri, text_field)
        else:
            texts = _whole_file(piece.uri, pass_over)
        yield from (text for text in texts if text)


def split_of(text: str, held_out: float) -> str:
    """`held_out` for that share of all texts, else `train`; decided by the text alone."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "held_out" if draw < held_out else "train"


def first_texts(files: Sequence[FileEntry], text_field: str, max_bytes: int, held_out: float) -> Iterator[str]:
    """Texts of `train` from the start of every file in turn, `max_bytes` in all, shared evenly as far as files reach.

    The last text taken from a file may be cut short.
    """
    left = max_bytes
    for ordinal, file in enumerate(files):
        share = min(max(left // (len(files) - ordinal), FEWEST_BYTES), left)
        for text in documents(Piece(file.uri, 0, file.size, whole=True), text_field, _ignore):
            if share <= 0:
                break
            if split_of(text, held_out) == "train":
                taken = text.encode()[:share]
                yield taken.decode(errors="ignore")
                share -= len(taken)
                left -= len(taken)


def _pieces(file: FileEntry, unit_bytes: int) -> list[Piece]:
    if not file.uri.endswith(".jsonl") or file.size <= unit_bytes:
        return [Piece(file.uri, 0, file.size, whole=True)]
    starts = range(0, file.size, unit_bytes)
    return [Piece(file.uri, start, min(start + unit_bytes, file.size), whole=False) for start in starts]


def _format(uri: str) -> str:
    path = PurePosixPath(uri)
    return path.with_suffix("").suffix if path.suffix in locations.COMPRESSION_SUFFIXES else path.suffix


def _whole_file(uri: str, pass_over: Callable[[str], object]) -> Iterator[str]:
    with locations.open_decompressed(uri) as stream:
        content = stream.read()
    try:
        yield content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        pass_over(uri)


def _json_lines(piece: Piece, text_field: str) -> Iterator[str]:
    with locations.open_decompressed(piece.uri) as stream:
        position = 0
        if piece.start:  # the line that the byte before us is in belongs to the piece before us
            stream.seek(piece.start - 1)
            position = piece.start - 1 + len(stream.readline())
        while piece.whole or position < piece.stop:
            line = stream.readline()
            if not line:
                return
            if line.strip():
                yield _text_of_line(line, piece.uri, position, text_field)
            position += len(line)


def _text_of_line(line: bytes, uri: str, position: int, text_field: str) -> str:
    try:
        values = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        fault = "is not UTF-8; convert the file"
    except ValueError as error:
        fault = f"is not JSON ({error}); each line must be one object"
    else:
        text = values.get(text_field) if isinstance(values, dict) else None
        if isinstance(text, str) and _is_unicode(text):
            return text
        fault = f"has no text under {text_field!r}; set text_field to the key that holds it"
        if isinstance(text, str):
            fault = f"has half a surrogate pair under {text_field!r}, which no text can hold; repair the line"
    raise CorpusError(f"line {_line_number(uri, position)} of {uri} {fault}")


def _line_number(uri: str, position: int) -> int:
    """Counted only when a line is at fault: lines before that byte of the decompressed file, and this one."""
    with locations.open_decompressed(uri) as stream:
        return stream.read(position).count(b"\n") + 1


def _parquet_rows(uri: str, text_field: str) -> Iterator[str]:
    plain = uri.endswith(".parquet")
    with locations.open_random(uri) if plain else locations.open_decompressed(uri) as stream:
        file = pq.ParquetFile(stream if plain else io.BytesIO(stream.read()))
        names = file.schema_arrow.names
        kind = file.schema_arrow.field(text_field).type if text_field in names else pa.null()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise CorpusError(f"{uri} has no text column {text_field!r}; set text_field to one of {', '.join(names)}")
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise CorpusError(f"row {row} of {uri} has no text under {text_field!r}; remove it or fill it in")
                yield text


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
