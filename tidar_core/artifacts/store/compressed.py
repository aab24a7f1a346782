"""The reader of compressed files, which detects damaged files.

How is a compressed file read, and is it whole?

A file that ends in the middle of its stream is damaged: reading it raises an error and never yields a shorter text. A
stream may have several gzip members or Zstandard frames, one after another. A file cut exactly between two of them
cannot be distinguished from a whole file.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.file_names import compression_of
from tidar_core.errors import CorpusError

__all__ = ["damage_named", "damaged", "open_decompressed"]

LARGEST_WINDOW = 2**31
"""Bytes that a Zstandard stream may look back: `zstd --long=31`, its own limit."""
INPUT_BYTES = 2**12
"""Compressed bytes that the decompressor gets at once: few, since each may become a thousand bytes."""
OUTPUT_BYTES = 2**17


def open_decompressed(uri: str) -> IO[bytes]:
    """The file at `uri` from its beginning, decompressed if its name ends in .gz or .zst."""
    raw, compression = locations.open_read(uri), compression_of(uri)
    if not compression:
        return raw
    if raw.seek(0, io.SEEK_END) == 0:
        raise EOFError("compressed file without a byte")
    raw.seek(0)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)  # pyrefly: ignore[bad-return]
    return io.BufferedReader(_ZstandardFrames(raw), OUTPUT_BYTES)


@contextmanager
def damage_named(uri: str) -> Iterator[None]:
    """Raises CorpusError, with the file's name, if its compression is damaged; UserError if reading is refused."""
    with locations.in_one_line(uri):
        try:
            yield
        except _damages() as error:
            raise damaged(uri, error) from error


def damaged(uri: str, error: Exception) -> CorpusError:
    """The error for a damaged file, with its name."""
    reason = " ".join(str(error).split())[:200]
    return CorpusError(f"{uri} is damaged ({reason}); fetch it again or leave it out")


class _ZstandardFrames(io.RawIOBase):
    """The content of all frames of a file. `zstandard`'s own reader ends a truncated frame like a whole one."""

    def __init__(self, source: IO[bytes]) -> None:
        import zstandard

        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (chunk := self._source.read(INPUT_BYTES)):
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            self._input = self._input or chunk
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        given = self._output[: len(buffer)]
        buffer[: len(given)] = given
        self._output = self._output[len(given) :]
        return len(given)

    def close(self) -> None:
        self._source.close()
        super().close()


def _damages() -> tuple[type[Exception], ...]:
    """Exceptions that decompressors raise; `zstandard`'s own error only if that module was loaded."""
    ours = (EOFError, zlib.error, gzip.BadGzipFile)
    return (*ours, sys.modules["zstandard"].ZstdError) if "zstandard" in sys.modules else ours
