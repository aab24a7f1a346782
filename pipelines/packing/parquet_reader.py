"""Entries of a Parquet file, in the requested columns."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.packing.parquet_values import written_entries
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.compressed import damaged, open_decompressed
from tidar_core.artifacts.store.file_names import compression_of
from tidar_core.errors import CorpusError

__all__ = ["columns_entries", "text_entries"]

ENTRIES_AT_ONCE = 128
READ_BYTES = 2**22
"""Bytes of a column read at once."""
LARGEST_UNPACKED = 2**33
"""Most bytes of a decompressed copy on this disk. Parquet is read in any order, so a compressed file needs a copy."""


def text_entries(uri: str, field: str) -> Iterator[dict[str, Any]]:
    """Entries of the file at `uri`, with the column `field`, which must hold text."""

    def require(schema: pa.Schema, found: Sequence[str]) -> None:
        if not found or not _is_text(schema.field(field).type):
            named = ", ".join(_described(column) for column in schema)
            raise CorpusError(f"{uri} has no text column {field!r}; set text_field to one of {named}")

    return _entries(uri, (field,), require, pa.RecordBatch.to_pylist)


def columns_entries(uri: str, fields: Sequence[str], needed: str) -> Iterator[dict[str, Any]]:
    """Entries of the file at `uri`, with the columns among `fields` that the file has; it must have one of them.

    Nulls that stand for missing keys are dropped.

    needed  what the columns hold, for the error
    """

    def require(schema: pa.Schema, found: Sequence[str]) -> None:
        if not found:
            raise CorpusError(f"{uri} has no column of {needed}")

    return _entries(uri, fields, require, written_entries)


def _entries(
    uri: str, fields: Sequence[str], require: Any, entries_of: Callable[[pa.RecordBatch], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    try:
        with _seekable(uri) as stream:
            file = pq.ParquetFile(stream, buffer_size=READ_BYTES)
            found = [name for name in file.schema_arrow.names if name in fields]
            for name in found:
                if found.count(name) > 1:
                    raise CorpusError(
                        f"{uri} has {found.count(name)} columns named {name!r}; one is needed; rename the others"
                    )
            require(file.schema_arrow, found)
            for batch in file.iter_batches(ENTRIES_AT_ONCE, columns=found):
                yield from entries_of(batch)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(uri, error) from error
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # pyarrow raises it for damaged content
            raise damaged(uri, error) from error
        raise


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _described(column: pa.Field) -> str:
    """The name of a column; with its type, if it holds no text."""
    return column.name if _is_text(column.type) else f"{column.name} ({str(column.type)[:40]})"


@contextmanager
def _seekable(uri: str) -> Iterator[IO[bytes]]:
    """The file at `uri` for reads in any order; a compressed file is first decompressed onto this disk."""
    if not compression_of(uri):
        with locations.open_random(uri) as stream:
            yield stream
        return
    with open_decompressed(uri) as packed, tempfile.TemporaryFile() as plain:
        while chunk := packed.read(locations.CHUNK_BYTES):
            if plain.tell() + len(chunk) > LARGEST_UNPACKED:
                raise CorpusError(
                    f"{uri} unpacks to more than {LARGEST_UNPACKED / 2**30:g} GiB; unpack it: a plain .parquet is read "
                    "where it lies"
                )
            with locations.in_one_line(tempfile.gettempdir()):
                plain.write(chunk)
        yield plain
