"""Shards: files of packed rows, and their manifest.

How are packed rows stored, and how are they read in any order?

    manifest.json           layout, counts and hashes; written last, so a folder with a manifest is complete
    made_by.json            the pack job and its parents
    tokenizer/              the tokenizer that made the ids
    train-00000.parquet     rows: input_ids and document_ids, int32 lists of row_len each; rows of conversations
    held_out-00000.parquet  also have trained, a list of row_len booleans: whether the model learns to predict a token

`tidar_core.training.packing` defines a row. Rows are compressed in groups of 64, so reading a random row decodes one
group.
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
    """Entry of the manifest for one shard."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of one purpose: `train` or `held_out`."""

    documents: int
    tokens: int
    """Tokens that are not padding, including the end-of-text token of each document."""
    rows: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """Documents and tokens of one source of the corpus."""

    path: str
    """Path as written in the job."""
    weight: float
    documents: Mapping[str, int]
    """Documents by split; a document that was taken several times counts several times."""
    tokens: Mapping[str, int]
    duplicates: int
    """Documents left out because a document taken before them has the same text."""
    passed_over: int
    """Files left out because they are not UTF-8 text."""
    left_out: int = 0
    """Entries of the source left out because they are not a trainable conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a folder of shards."""

    row_len: int
    eos_id: int
    vocab_len: int
    """Upper bound of the input ids: every id is below it."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    identity: str
    """Hash of the job, the corpus listing and the tokenizer. Folders with equal identities have equal shards."""
    splits: Mapping[str, Split]
    sources: tuple[SourceCounts, ...]
    """Sources in the order of the job."""
    trained: bool = False
    """Whether rows mark the tokens that the model learns to predict; otherwise it learns all."""
    format_version: int = FORMAT_VERSION


def shard_name(split: str, ordinal: int) -> str:
    """File name of a shard, by its ordinal in the split."""
    return f"{split}-{ordinal:05d}.parquet"


def write_shard(uri: str, rows: PackedRows) -> ShardEntry:
    """Write one shard and return its entry for the manifest. The same rows give the same bytes."""
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
    """Write the manifest, which completes the folder at `uri`."""
    locations.write_json(locations.join(uri, MANIFEST), asdict(manifest))


def read_manifest(uri: str) -> Manifest:
    """Read the manifest of the folder at `uri`. Raises ShardError if it is not a complete folder of shards."""
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
    """Compare the files with the sizes and counts of the manifest, without reading them."""
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
    """Compare one shard of the folder at `uri` with its size and hash."""
    where = locations.join(uri, shard.file)
    if not locations.exists(where):
        raise ShardError(f"{where} is missing; {REPACK}")
    _check_size(uri, shard, locations.size(where))
    digest = locations.sha256(where)
    if digest != shard.sha256:
        raise ShardError(f"{where} has hash {digest[:12]}; the manifest has {shard.sha256[:12]}; {REPACK}")


def verify_shards(uri: str) -> Manifest:
    """Compare every shard of the folder at `uri` with its size and hash, and return the manifest."""
    manifest = read_manifest(uri)
    check_sizes(uri, manifest)
    for split in manifest.splits.values():
        for shard in split.shards:
            verify(uri, shard)
    return manifest


class ShardReader:
    """Reader of the rows of one split by ordinal, in any order.

    The constructor checks sizes. Decoded groups of rows are cached up to `cache_bytes`; the least recently used group
    is dropped first.
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
        """Read the rows with these ordinals, in this order. Ids are int64, flags bool."""
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
            raise ShardError(f"{where} has {rows} rows; the manifest has {entry.rows}; {REPACK}")
        found = {field.name: field.type for field in file.schema_arrow}
        for name, kind in self._columns.items():
            expected = pa.list_(kind, self.manifest.row_len)
            if name not in found or not found[name].equals(expected):
                raise ShardError(f"{where} has {name} of {found.get(name)}; the manifest has {expected}; {REPACK}")
        return file


def _split(values: dict[str, Any]) -> Split:
    return Split(**(values | {"shards": tuple(ShardEntry(**shard) for shard in values["shards"])}))


def _check_size(uri: str, shard: ShardEntry, found: int) -> None:
    if found != shard.bytes:
        where = locations.join(uri, shard.file)
        raise ShardError(f"{where} has {found} bytes; the manifest has {shard.bytes}; {REPACK}")


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
