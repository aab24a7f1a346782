"""How do packed rows lie at rest, and how are they read in any order?

    manifest.json           layout, counts and hashes; the folder is complete when it is there
    made_by.json            the pack job and its parents
    tokenizer/              the tokenizer that made the ids
    train-00000.parquet     rows: input_ids and document_ids, int32 lists of row_len each; of conversations also
    held_out-00000.parquet  trained, a list of row_len booleans: whether a token is one to learn to say

What a row is: `tidar_core.training.packing`. Rows are compressed in groups of 64, so that a random row costs one group.
"""

import hashlib
import io
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tidar_core.artifacts.store import locations
from tidar_core.errors import ShardError, StorageError
from tidar_core.training.packing import PackedRows, row_count
from tidar_core.transformer.layout import PADDING

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "SPLITS",
    "TOKENIZER",
    "Manifest",
    "ShardEntry",
    "ShardReader",
    "SourceCounts",
    "Split",
    "check_sizes",
    "read_manifest",
    "shard_name",
    "verify",
    "verify_shards",
    "write_manifest",
    "write_shard",
]

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "held_out")
COLUMNS = {"input_ids": pa.int32(), "document_ids": pa.int32()}
FLAGS = {"trained": pa.bool_()}

GROUP_ROWS = 64
OPEN_FILES = 16
REPACK = "remove the folder and run pack again"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """What the manifest says of one shard."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of one purpose: `train` or `held_out`."""

    documents: int
    tokens: int
    """Tokens that are no padding, the end-of-text token of each document included."""
    rows: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """What one source of the corpus gave."""

    path: str
    """As the job names it."""
    weight: float
    documents: Mapping[str, int]
    """By split, each as often as it was taken."""
    tokens: Mapping[str, int]
    duplicates: int
    """Documents left out, because a document taken before them has the same text."""
    passed_over: int
    """Files left out, because they are not UTF-8 text."""
    left_out: int = 0
    """Rows left out, because they are no conversation that can be learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder of shards holds."""

    row_len: int
    eos_id: int
    vocab_len: int
    """Every input id is below this."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    identity: str
    """Hash of the job, the corpus listing and the tokenizer: equal identities, equal shards."""
    splits: Mapping[str, Split]
    sources: tuple[SourceCounts, ...]
    """In the order of the job."""
    trained: bool = False
    """Whether rows say which of their tokens are ones to learn to say; otherwise all are."""
    format_version: int = FORMAT_VERSION


def shard_name(split: str, ordinal: int) -> str:
    """File name of the shard of that ordinal."""
    return f"{split}-{ordinal:05d}.parquet"


def write_shard(uri: str, rows: PackedRows) -> ShardEntry:
    """Write one shard and say what the manifest is to say of it. The same rows give the same bytes."""
    row_len = rows.input_ids_BS.shape[1]
    kinds = _columns(rows.trained_BS is not None)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values_BS.contiguous().view(-1).numpy(), kind), row_len)
        for kind, values_BS in zip(kinds.values(), _tensors(rows))
    ]
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns, names=list(kinds)),
        buffer,
        row_group_size=GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    content = buffer.getvalue()
    locations.write_bytes(uri, content)
    return ShardEntry(
        file=locations.name_of(uri),
        rows=len(rows.input_ids_BS),
        tokens=int((rows.document_ids_BS != PADDING).sum()),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Complete the folder at `uri`."""
    locations.write_json(locations.join(uri, MANIFEST), asdict(manifest))


def read_manifest(uri: str) -> Manifest:
    """What the folder at `uri` holds. Raises ShardError when it is not a complete folder of shards."""
    where = locations.join(uri, MANIFEST)
    if not locations.exists(where):
        raise ShardError(f"{uri} holds no {MANIFEST}; give a folder that pack completed")
    try:
        values = json.loads(locations.read_text(where))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ShardError(f"{where} has format version {version}; this code reads {FORMAT_VERSION}; {REPACK}")
        splits = {name: _split(values["splits"][name]) for name in SPLITS}
        sources = tuple(SourceCounts(**source) for source in values["sources"])
        return Manifest(**(values | {"splits": splits, "sources": sources}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{where} is damaged ({type(error).__name__}: {error}); {REPACK}") from error


def check_sizes(uri: str, manifest: Manifest) -> None:
    """Hold the files to the sizes and counts of the manifest, without reading them."""
    found = {entry.name: entry.size for entry in locations.list_files(uri)}
    for name, split in manifest.splits.items():
        for shard in split.shards:
            if shard.file not in found:
                raise ShardError(f"{locations.join(uri, shard.file)} is missing; {REPACK}")
            _check_size(uri, shard, found[shard.file])
        counted = sum(shard.rows for shard in split.shards), sum(shard.tokens for shard in split.shards)
        if counted != (split.rows, split.tokens) or split.rows != row_count(split.tokens, manifest.row_len):
            raise ShardError(f"the counts of split {name} in {locations.join(uri, MANIFEST)} do not add up; {REPACK}")


def verify(uri: str, shard: ShardEntry) -> None:
    """Hold one shard of the folder at `uri` to its size and hash."""
    where = locations.join(uri, shard.file)
    if not locations.exists(where):
        raise ShardError(f"{where} is missing; {REPACK}")
    _check_size(uri, shard, locations.size(where))
    digest = locations.sha256(where)
    if digest != shard.sha256:
        raise ShardError(f"{where} has hash {digest[:12]}; the manifest says {shard.sha256[:12]}; {REPACK}")


def verify_shards(uri: str) -> Manifest:
    """Hold every shard of the folder at `uri` to its size and hash."""
    manifest = read_manifest(uri)
    check_sizes(uri, manifest)
    for split in manifest.splits.values():
        for shard in split.shards:
            verify(uri, shard)
    return manifest


class ShardReader:
    """The rows of one split, by ordinal, in any order.

    Sizes are checked when it opens. Decoded groups of rows are kept up to `cache_bytes`, the latest used longest.
    """

    def __init__(self, uri: str, split: str = "train", *, cache_bytes: int = 256 * 2**20) -> None:
        self.uri = locations.absolute(uri)
        self.manifest = read_manifest(self.uri)
        if split not in self.manifest.splits:
            raise ShardError(f"split is {split!r}; {uri} has {', '.join(self.manifest.splits)}")
        check_sizes(self.uri, self.manifest)
        self._shards = self.manifest.splits[split].shards
        self._begins = list(accumulate((shard.rows for shard in self._shards), initial=0))
        self._columns = _columns(self.manifest.trained)
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[int, int], PackedRows] = OrderedDict()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __len__(self) -> int:
        return self._begins[-1]

    def rows(self, indices: Sequence[int]) -> PackedRows:
        """The rows of these ordinals, in this order; int64, flags bool."""
        picked = [self._row(index) for index in indices]
        stacked = [torch.stack(values) for values in zip(*map(_tensors, picked))]
        return PackedRows(stacked[0].long(), stacked[1].long(), *stacked[2:])

    def _row(self, index: int) -> PackedRows:
        if not 0 <= index < len(self):
            raise ShardError(f"row is {index}; {self.uri} has rows 0..{len(self) - 1} in this split")
        shard = bisect_right(self._begins, index) - 1
        group, row = divmod(index - self._begins[shard], GROUP_ROWS)
        rows = self._group(shard, group)
        return PackedRows(*(values[row] for values in _tensors(rows)))

    def _group(self, shard: int, group: int) -> PackedRows:
        key = shard, group
        if key not in self._groups:
            entry = self._shards[shard]
            try:
                table = self._file(shard).read_row_group(group, columns=list(self._columns))
            except StorageError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(self.uri, entry, error) from error
            self._groups[key] = PackedRows(*(self._tensor(table.column(name)) for name in self._columns))
            while len(self._groups) > 1 and sum(map(_bytes, self._groups.values())) > self._cache_bytes:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _tensor(self, column: pa.ChunkedArray) -> Tensor:
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.tensor(flat).view(-1, self.manifest.row_len)

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self._open(self._shards[shard])
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close(force=True)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, entry: ShardEntry) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(locations.open_random(locations.join(self.uri, entry.file)))
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.uri, entry, error) from error
        where, rows = locations.join(self.uri, entry.file), file.metadata.num_rows
        if rows != entry.rows:
            raise ShardError(f"{where} has {rows} rows; the manifest says {entry.rows}; {REPACK}")
        found = {field.name: field.type for field in file.schema_arrow}
        for name, kind in self._columns.items():
            expected = pa.list_(kind, self.manifest.row_len)
            if name not in found or not found[name].equals(expected):
                raise ShardError(f"{where} has {name} of {found.get(name)}; the manifest says {expected}; {REPACK}")
        return file


def _split(values: dict[str, Any]) -> Split:
    return Split(**(values | {"shards": tuple(ShardEntry(**shard) for shard in values["shards"])}))


def _check_size(uri: str, shard: ShardEntry, found: int) -> None:
    if found != shard.bytes:
        where = locations.join(uri, shard.file)
        raise ShardError(f"{where} has {found} bytes; the manifest says {shard.bytes}; {REPACK}")


def _columns(trained: bool) -> dict[str, pa.DataType]:
    return COLUMNS | FLAGS if trained else COLUMNS


def _tensors(rows: PackedRows) -> list[Tensor]:
    values = rows.input_ids_BS, rows.document_ids_BS, rows.trained_BS
    return [value for value in values if value is not None]


def _bytes(rows: PackedRows) -> int:
    return sum(value.numel() * value.element_size() for value in _tensors(rows))


def _unreadable(uri: str, entry: ShardEntry, error: Exception) -> ShardError:
    reason = " ".join(str(error).split())[:200]
    return ShardError(f"{locations.join(uri, entry.file)} cannot be read ({reason}); {REPACK}")
