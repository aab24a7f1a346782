"""How do tokenized documents lie between the two halves of packing?

In parts: files with one document a row, each written whole by one actor and read by the tasks that cut shards from it.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tidar_core.artifacts import locations

__all__ = ["Part", "PartTokens", "PartWriter", "read_part"]

PART_TOKENS = 2**22
"""Tokens of one part, about: what an actor holds before it writes."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive documents of a split, tokenized, in one file."""

    split: str
    file: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PartTokens:
    """The documents of a part, one after another."""

    tokens_T: Tensor
    document_len_N: Tensor


def read_part(uri: str) -> PartTokens:
    """What a writer left in that file."""
    with locations.open_read(uri) as source:
        column = pq.read_table(source).column("ids").combine_chunks()
    ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
    return PartTokens(torch.from_numpy(ids.copy()), torch.from_numpy(lengths.copy()))


@dataclass(slots=True)
class PartWriter:
    """Documents of one split and unit, written out whenever there are enough of them."""

    scratch: str
    split: str
    unit: int
    _parts: list[Part] = field(default_factory=list)
    _documents: list[np.ndarray] = field(default_factory=list)
    _tokens: int = 0

    def add(self, ids: list[int]) -> None:
        """Take the next document."""
        self._documents.append(np.asarray(ids, dtype=np.int32))
        self._tokens += len(ids)
        if self._tokens >= PART_TOKENS:
            self._write()

    def close(self) -> list[Part]:
        """Write what is left; all parts in order."""
        if self._documents:
            self._write()
        return self._parts

    def _write(self) -> None:
        file = f"{self.split}-{self.unit:07d}-{len(self._parts):05d}.parquet"
        offsets = np.cumsum([0, *map(len, self._documents)], dtype=np.int64)
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._documents)))
        with locations.open_write(locations.join(self.scratch, file)) as sink:
            pq.write_table(pa.table({"ids": column}), sink, compression="zstd", use_dictionary=False)
        self._parts.append(Part(self.split, file, len(self._documents), self._tokens))
        self._documents, self._tokens = [], 0
