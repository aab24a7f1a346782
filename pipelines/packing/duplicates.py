"""Removal of documents that repeat an earlier document of the corpus exactly.

Of equal documents, the first taken document stays, in the order of the corpus. A document that its source's weight
leaves out does not count: the next source may take it. Each of three passes holds only a share of the hashes:

1. Each unit of work writes the digests of its documents, grouped by their first byte, and which of them are taken.
2. Each bucket, a range of first bytes, is compared over all units; its repeats are written, grouped by unit.
3. The task that tokenizes a unit reads from all buckets which of its documents are repeats.

The outcome depends on the order of the documents alone, not on units or buckets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tidar_core.artifacts.store import locations

__all__ = ["Bucket", "find_repeats", "make_buckets", "read_repeats", "write_digests"]

BUCKET_DOCUMENTS = 2**22
"""Approximate number of documents whose digests are compared in one task."""
FIRST_BYTES = 256
DIGEST = np.dtype([("high", ">u8"), ("low", ">u8"), ("ordinal", "<u4"), ("taken", "?")])
"""Half of a SHA-256, which is enough to distinguish documents; the document's ordinal in its unit; and whether the
weight of its source takes it."""
ORDINAL = np.dtype("<u4")
INDEX = np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class Bucket:
    """The digests that begin with the bytes [first, last)."""

    first: int
    last: int


def write_digests(uri: str, digests: Sequence[bytes], taken: Sequence[bool]) -> None:
    """Write the digests of a unit's documents, given in order, and which of the documents are taken."""
    halves = np.frombuffer(b"".join(digest[:16] for digest in digests), dtype=">u8").reshape(-1, 2)
    records = np.empty(len(digests), DIGEST)
    records["high"], records["low"], records["ordinal"] = halves[:, 0], halves[:, 1], np.arange(len(digests))
    records["taken"] = taken
    first_bytes = (records["high"] >> np.uint64(56)).astype(np.int64)
    _write_groups(uri, records[np.argsort(first_bytes, kind="stable")], np.bincount(first_bytes, minlength=FIRST_BYTES))


def make_buckets(documents: int) -> list[Bucket]:
    """The fewest buckets that hold about BUCKET_DOCUMENTS documents each; at most FIRST_BYTES of them."""
    count = min(max(1, -(-documents // BUCKET_DOCUMENTS)), FIRST_BYTES)
    edges = [FIRST_BYTES * place // count for place in range(count + 1)]
    return [Bucket(first, last) for first, last in pairwise(edges)]


def find_repeats(digests: Iterable[str], bucket: Bucket, uri: str) -> int:
    """Write to `uri` which documents of the bucket repeat an earlier taken document; returns their number.

    digests  addresses that `write_digests` wrote, of every unit, in the order of the corpus
    """
    found = [_read_groups(unit, bucket.first, bucket.last, DIGEST) for unit in digests]
    records = np.concatenate(found)
    unit = np.repeat(np.arange(len(found)), [len(some) for some in found])
    order = np.lexsort((records["low"], records["high"]))  # stable: equal digests stay in the order of the corpus
    high, low, taken = (records[name][order] for name in ("high", "low", "taken"))
    same = np.concatenate([[False], (high[1:] == high[:-1]) & (low[1:] == low[:-1])])[: len(order)]
    before = np.cumsum(taken) - taken  # documents taken, in this order, before each
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))  # where a run of equal digests begins
    repeats = np.sort(order[before > before[first]])
    _write_groups(uri, records["ordinal"][repeats].astype(ORDINAL), np.bincount(unit[repeats], minlength=len(found)))
    return len(repeats)


def read_repeats(repeats: Iterable[str], unit: int) -> set[int]:
    """Ordinals of the documents of a unit that are repeats.

    repeats  addresses that `find_repeats` wrote, of every bucket
    """
    return {int(ordinal) for uri in repeats for ordinal in _read_groups(uri, unit, unit + 1, ORDINAL)}


def _write_groups(uri: str, records: np.ndarray, counts: np.ndarray) -> None:
    """Write the records group after group, behind an index: the number of groups, and where each begins."""
    index = np.concatenate([[len(counts), 0], np.cumsum(counts)]).astype(INDEX)
    locations.write_bytes(uri, index.tobytes() + records.tobytes())


def _read_groups(uri: str, first: int, last: int, kind: np.dtype) -> np.ndarray:
    """The records of the groups [first, last) only."""
    with locations.open_random(uri) as file:
        groups = int(np.frombuffer(file.read(INDEX.itemsize), INDEX)[0])
        file.seek((1 + first) * INDEX.itemsize)
        index = np.frombuffer(file.read((last - first + 1) * INDEX.itemsize), INDEX).astype(np.int64)
        file.seek((groups + 2) * INDEX.itemsize + int(index[0]) * kind.itemsize)
        return np.frombuffer(file.read(int(index[-1] - index[0]) * kind.itemsize), kind)
