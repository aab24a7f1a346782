"""The documents of a corpus, in their order.

The order is the order of the sources, then of the file names, and within a file of its lines or entries. A text file is
one document. JSON lines (.jsonl, .ndjson) and Parquet hold one document in each entry: a text under one field, or a
conversation. Empty documents are skipped.

Text is UTF-8 and is never repaired. A text file that is not UTF-8 is skipped and reported. A damaged file, a line that
is not JSON, an entry without text or too long a document ends the job. The error names its place. An entry that is no
trainable conversation is left out and reported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from pipelines.jobs import Source
from pipelines.packing.conversations import CONVERSATION_FIELDS, conversation_of
from pipelines.packing.parquet_reader import columns_entries, text_entries
from pipelines.packing.skipped_entries import LeftOut
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.compressed import damage_named, open_decompressed
from tidar_core.artifacts.store.file_names import compression_of, format_of
from tidar_core.artifacts.store.json_lines import is_blank, value_in
from tidar_core.artifacts.store.locations import FileEntry
from tidar_core.errors import CorpusError

__all__ = [
    "JSON_LINES",
    "PARQUET",
    "Document",
    "Entry",
    "Piece",
    "documents",
    "first_texts",
    "list_corpus",
    "located_documents",
    "object_entries",
    "work_units",
]

A_CONVERSATION = "a conversation; it needs messages, or prompt and response"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
KINDS = {list: "a list", dict: "an object", str: "a text", bool: "true or false", int: "a number", float: "a number"}
"""Names of JSON's kinds of values, by Python's type."""
FEWEST_BYTES = 2**16
"""Bytes read from each file, at least, when a tokenizer is trained on the beginnings of all files."""
LONGEST_DOCUMENT = 2**27
"""Most bytes of one document, because it is held in memory whole."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or the part of a file whose lines begin in the bytes [start, stop)."""

    uri: str
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of JSON, or an entry of Parquet in the columns that were read."""

    values: Any
    place: Callable[[], str]
    """Returns the place of the entry; found only when it is needed, because lines are not counted."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the JSON of a conversation that `pipelines.packing.conversations` writes."""

    text: str
    place: Callable[[], str]
    """Returns the place of the document; found only when it is needed, because lines are not counted."""


def list_corpus(
    corpus: str, include: Sequence[str], exclude: Sequence[str] = (), *, key: str = "corpus"
) -> list[FileEntry]:
    """The files of a corpus in order. Raises CorpusError if there are no files.

    exclude  patterns of names of files and folders to leave out; everything below such a folder is left out too
    key      key of the job that names the corpus
    """
    listed = locations.list_files(locations.absolute(corpus), include, exclude)
    for entry in listed:
        if not entry.size and (compression_of(entry.name) or format_of(entry.name) == PARQUET):
            raise CorpusError(f"{entry.uri} is damaged (it has no bytes); fetch it again or leave it out")
    files = [entry for entry in listed if entry.size]
    if files:
        return files
    if not locations.exists(corpus) and not locations.is_glob(corpus):
        raise CorpusError(f"{key} {corpus} does not exist; give a file, a folder or a glob")
    raise CorpusError(f"{key} {corpus} holds no text in files named {', '.join(include)}; check {key} and include")


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
    """The texts of `located_documents`."""
    return (document.text for document in located_documents(piece, source, pass_over, LeftOut()))


def located_documents(
    piece: Piece, source: Source, pass_over: Callable[[str], object], left_out: LeftOut
) -> Iterator[Document]:
    """The documents of a piece in order, without empty documents.

    pass_over  called with each file that is not UTF-8 text
    left_out   counts the entries that are no trainable conversation
    """
    with damage_named(piece.uri):
        if format_of(piece.uri) not in (*JSON_LINES, PARQUET):
            found = _whole_file(piece.uri, source, pass_over)
        elif source.documents == "conversations":
            found = _documents_of(object_entries(piece, CONVERSATION_FIELDS, A_CONVERSATION), source, left_out)
        elif format_of(piece.uri) == PARQUET:
            texts = text_entries(piece.uri, str(source.text_field))
            found = _documents_of(_parquet_entries(piece.uri, texts), source, left_out)
        else:
            found = _documents_of(_json_lines(piece), source, left_out)
        yield from (document for document in found if document.text)


def object_entries(piece: Piece, fields: Sequence[str], needed: str) -> Iterator[Entry]:
    """The entries of a piece of JSON lines or Parquet in order. A line may hold any value of JSON.

    Raises CorpusError for a damaged file, a line that is not JSON, and a Parquet file without any of the columns.

    fields  columns that are read from Parquet, if it has them
    needed  what at least one of the columns must hold, for the error
    """
    with damage_named(piece.uri):
        if format_of(piece.uri) == PARQUET:
            yield from _parquet_entries(piece.uri, columns_entries(piece.uri, fields, needed))
        else:
            yield from _json_lines(piece)


def first_texts(
    corpus: Sequence[tuple[FileEntry, Source]], max_bytes: int, taken: Callable[[str], bool]
) -> Iterator[str]:
    """Texts from the start of every file in turn, `max_bytes` in all, shared evenly as far as files reach.

    The last text taken from a file may be cut short.

    taken  whether a text may be used at all
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
    can_be_cut = format_of(file.uri) in JSON_LINES and not compression_of(file.uri)
    if not can_be_cut or file.size <= unit_bytes:
        return [Piece(file.uri, 0, file.size, whole=True)]
    starts = range(0, file.size, unit_bytes)
    return [Piece(file.uri, start, min(start + unit_bytes, file.size), whole=False) for start in starts]


def _whole_file(uri: str, source: Source, pass_over: Callable[[str], object]) -> Iterator[Document]:
    if source.documents == "conversations":
        raise CorpusError(f"{uri} is one text; conversations lie in JSON lines or Parquet; leave it out by include")
    with open_decompressed(uri) as stream:
        content = stream.read(LONGEST_DOCUMENT + 1)
    _require_end(len(content), uri.__str__)
    try:
        yield Document(content.decode("utf-8").removeprefix("\ufeff"), lambda: uri)
    except UnicodeDecodeError:
        pass_over(uri)


def _json_lines(piece: Piece) -> Iterator[Entry]:
    with open_decompressed(piece.uri) as stream:
        position = 0
        if piece.start:  # the line of the byte before this piece belongs to the piece before
            stream.seek(piece.start - 1)
            position = piece.start - 1 + len(_line(stream, piece.uri, piece.start - 1))
        while piece.whole or position < piece.stop:
            line = _line(stream, piece.uri, position)
            if not line:
                return
            if not is_blank(line):
                place = partial(_line_place, piece.uri, position)
                try:
                    values = value_in(line)
                except ValueError as fault:
                    raise CorpusError(f"{place()} {fault}") from None
                yield Entry(values, place)
            position += len(line)


def _line(stream: IO[bytes], uri: str, position: int) -> bytes:
    line = stream.readline(LONGEST_DOCUMENT + 1)
    if len(line) > LONGEST_DOCUMENT:
        _require_end(len(line), partial(_line_place, uri, position))
    return line


def _documents_of(found: Iterable[Entry], source: Source, left_out: LeftOut) -> Iterator[Document]:
    """The documents of entries, without conversations that cannot be used, which are left out."""
    for entry in found:
        try:
            text = _document_of(entry.values, source)
        except ValueError as fault:
            if source.documents != "conversations":
                raise CorpusError(f"{entry.place()} {fault}") from None
            left_out.add(entry.place, fault)
        else:
            _require_end(len(text), entry.place)
            yield Document(text, entry.place)


def _document_of(values: Any, source: Source) -> str:
    """The text of an entry. Raises ValueError with the cause."""
    try:
        text = _conversation_of(values) if source.documents == "conversations" else _text_of(values, source)
    except RecursionError:
        raise ValueError("is nested too deeply to be read; flatten or remove the entry") from None
    if not _is_unicode(text):
        raise ValueError("has half a surrogate pair, which no text can hold; repair it")
    return text


def _conversation_of(values: Any) -> str:
    if not isinstance(values, dict):
        raise ValueError(f"has no conversation, it is {_kind(values)}; each line must be one object")
    return conversation_of(values)


def _text_of(values: Any, source: Source) -> str:
    field = str(source.text_field)
    if not isinstance(values, dict):
        raise ValueError(f"has no text under {field!r}, it is {_kind(values)}; each line must be one object")
    if field not in values:
        raise ValueError(f"has no text under {field!r}; set text_field to the key that holds it")
    text = values[field]
    if not isinstance(text, str):
        raise ValueError(f"has no text under {field!r}, that is {_kind(text)}; put a text there, or remove the row")
    return text


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS[type(value)]


def _line_place(uri: str, position: int) -> str:
    """The line that begins at that byte of the decompressed file; lines are counted only for a report."""
    number = 1
    with open_decompressed(uri) as stream:
        while position > 0 and (chunk := stream.read(min(position, locations.CHUNK_BYTES))):
            number += chunk.count(b"\n")
            position -= len(chunk)
    return f"line {number} of {uri}"


def _parquet_entries(uri: str, values: Iterable[Any]) -> Iterator[Entry]:
    return (Entry(entry, f"row {number} of {uri}".__str__) for number, entry in enumerate(values, 1))


def _require_end(size: int, where: Callable[[], str]) -> None:
    if size > LONGEST_DOCUMENT:
        raise CorpusError(f"{where()} is longer than {LONGEST_DOCUMENT // 2**20} MiB; cut it into documents")


def _ignore(uri: str) -> None:
    """Ignore a file that is no text; the tasks that tokenize it report it."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
