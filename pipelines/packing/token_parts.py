"""Files of tokenized documents between the two halves of packing.

In parts: files with one document a row, each written whole by one task and read by the tasks that cut shards from it.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tidar_core.artifacts.store import locations

__all__ = ["Part", "PartTokens", "PartWriter", "read_part"]

PART_TOKENS = 2**22
"""Approximate tokens of a part; a task holds as many before it writes."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokenized documents of a source and stream, in one file."""

    source: int
    stream: str
    file: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PartTokens:
    """The documents of a part, one after another."""

    tokens_T: Tensor
    document_len_N: Tensor
    trained_T: Tensor | None
    """Whether a token is trained; None: all are."""


def read_part(uri: str) -> PartTokens:
    """The documents of a part that a `PartWriter` wrote."""
    with locations.open_read(uri) as source:
        table = pq.read_table(source)
    ids = table.column("ids").combine_chunks()
    trained = table.column("trained").combine_chunks().flatten() if "trained" in table.column_names else None
    return PartTokens(
        torch.from_numpy(ids.flatten().to_numpy().copy()),
        torch.from_numpy(ids.value_lengths().to_numpy().copy()),
        None if trained is None else torch.from_numpy(trained.to_numpy(zero_copy_only=False).copy()),
    )


@dataclass(slots=True)
class PartWriter:
    """Writer of the documents of one stream and unit; it writes a part whenever it holds enough tokens."""

    folder: str
    source: int
    stream: str
    unit: int
    _parts: list[Part] = field(default_factory=list)
    _documents: list[np.ndarray] = field(default_factory=list)
    _trained: list[np.ndarray] = field(default_factory=list)
    _tokens: int = 0

    def add(self, ids: np.ndarray, trained: np.ndarray | None = None) -> None:
        """Add the next document; `trained` is given for all documents or never."""
        self._documents.append(ids)
        if trained is not None:
            self._trained.append(trained)
        self._tokens += len(ids)
        if self._tokens >= PART_TOKENS:
            self._write()

    def close(self) -> list[Part]:
        """Write the rest; returns all parts in order."""
        if self._documents:
            self._write()
        return self._parts

    def _write(self) -> None:
        file = f"{self.stream}-{self.unit:07d}-{len(self._parts):05d}.parquet"
        offsets = pa.array(np.cumsum([0, *map(len, self._documents)], dtype=np.int64))
        columns = {"ids": self._documents} | ({"trained": self._trained} if self._trained else {})
        lists = {
            name: pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values)))
            for name, values in columns.items()
        }
        with locations.open_write(locations.join(self.folder, file)) as sink:
            pq.write_table(pa.table(lists), sink, compression="lz4", use_dictionary=False)
        self._parts.append(Part(self.source, self.stream, file, len(self._documents), self._tokens))
        self._documents, self._trained, self._tokens = [], [], 0
