"""Shards are read as they were written, and damage is named."""

import json
from pathlib import Path

import pytest
import torch

from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations
from tidar_core.errors import ShardError
from tidar_core.training.packing import PackedRows
from tidar_core.transformer.layout import PADDING

ROW_LEN = 8
ROWS_PER_SHARD = 100


@pytest.fixture
def rows():
    """250 rows of 8; the last three positions are padding."""
    input_ids_BS = torch.arange(250 * ROW_LEN, dtype=torch.int32).view(250, ROW_LEN) % 97
    document_ids_BS = torch.arange(250 * ROW_LEN, dtype=torch.int32).view(250, ROW_LEN) // 11
    input_ids_BS[-1, -3:], document_ids_BS[-1, -3:] = 0, PADDING
    return PackedRows(input_ids_BS, document_ids_BS)


def write(uri, rows):
    entries = []
    for ordinal, start in enumerate(range(0, len(rows.input_ids_BS), ROWS_PER_SHARD)):
        stop = start + ROWS_PER_SHARD
        flags_BS = None if rows.trained_BS is None else rows.trained_BS[start:stop]
        part = PackedRows(rows.input_ids_BS[start:stop], rows.document_ids_BS[start:stop], flags_BS)
        entries.append(shards.write_shard(locations.join(uri, shards.shard_name("train", ordinal)), part))
    train = shards.Split(documents=182, tokens=1997, rows=250, shards=tuple(entries))
    empty = shards.Split(documents=0, tokens=0, rows=0, shards=())
    manifest = shards.Manifest(
        row_len=ROW_LEN,
        eos_id=0,
        vocab_len=97,
        tokenizer="fingerprint",
        identity="identity",
        splits={"train": train, "held_out": empty},
        sources=(),
        trained=rows.trained_BS is not None,
    )
    shards.write_manifest(uri, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path, rows):
    write(str(tmp_path), rows)
    return tmp_path


def shard(folder: Path) -> Path:
    return folder / "train-00001.parquet"


def test_the_manifest_read_is_the_manifest_written(tmp_path, rows):
    assert write(str(tmp_path), rows) == shards.read_manifest(str(tmp_path))
    entries = shards.read_manifest(str(tmp_path)).splits["train"].shards
    assert [(e.file, e.rows, e.tokens) for e in entries] == [
        ("train-00000.parquet", 100, 800),
        ("train-00001.parquet", 100, 800),
        ("train-00002.parquet", 50, 397),
    ]


def test_rows_come_in_the_requested_order(folder, rows):
    reader = shards.ShardReader(str(folder), "train")
    assert len(reader) == 250
    order = [249, 0, 99, 100, 63, 64, 0, 163, 164, 201]
    read = reader.rows(order)
    assert torch.equal(read.input_ids_BS, rows.input_ids_BS[order].long())
    assert torch.equal(read.document_ids_BS, rows.document_ids_BS[order].long())
    assert read.input_ids_BS.dtype == read.document_ids_BS.dtype == torch.int64


def test_rows_mark_the_trained_tokens_if_the_manifest_has_the_flag(folder, rows, tmp_path_factory):
    assert shards.ShardReader(str(folder)).rows([0]).trained_BS is None
    trained_BS = (torch.arange(250 * ROW_LEN) % 7 == 3).view(250, ROW_LEN)
    other = str(tmp_path_factory.mktemp("flags"))
    manifest = write(other, PackedRows(rows.input_ids_BS, rows.document_ids_BS, trained_BS))
    assert manifest.trained
    order = [249, 0, 64, 163]
    read = shards.ShardReader(other).rows(order)
    assert torch.equal(read.trained_BS, trained_BS[order])
    assert torch.equal(read.input_ids_BS, rows.input_ids_BS[order].long())
    edit(folder, lambda values: values.update(trained=True))
    with pytest.raises(ShardError, match=r"train-00000\.parquet has trained of None; the manifest has .*bool.*\[8\]"):
        shards.ShardReader(str(folder)).rows([0])


def test_rows_on_an_object_store_are_the_same(s3_bucket, rows):
    write(s3_bucket, rows)
    read = shards.ShardReader(s3_bucket, "train").rows([7, 249, 130])
    assert torch.equal(read.input_ids_BS, rows.input_ids_BS[[7, 249, 130]].long())
    shards.verify_shards(s3_bucket)


def test_the_cache_never_exceeds_its_bytes_and_changes_no_row(folder, rows):
    group_bytes = 64 * ROW_LEN * 4 * 2
    reader = shards.ShardReader(str(folder), "train", cache_bytes=2 * group_bytes)
    for index in (0, 249, 64, 100, 0, 170, 249):
        assert torch.equal(reader.rows([index]).input_ids_BS[0], rows.input_ids_BS[index].long())
        assert sum(map(shards._bytes, reader._groups.values())) <= 2 * group_bytes
    assert list(reader._groups) == [(1, 1), (2, 0)]


def test_a_split_may_be_empty_and_an_unknown_one_is_refused(folder):
    assert len(shards.ShardReader(str(folder), "held_out")) == 0
    with pytest.raises(ShardError, match=r"split is 'test'; .* has train, held_out"):
        shards.ShardReader(str(folder), "test")
    with pytest.raises(ShardError, match=r"row is 250; .* has rows 0\.\.249"):
        shards.ShardReader(str(folder), "train").rows([250])


def test_equal_rows_give_equal_bytes(tmp_path, rows):
    first = write(str(tmp_path / "a"), rows)
    assert write(str(tmp_path / "b"), rows) == first
    assert shard(tmp_path / "a").read_bytes() == shard(tmp_path / "b").read_bytes()


def test_a_truncated_shard_is_refused_when_opened(folder):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[:-10])
    expected = rf"train-00001\.parquet has {len(content) - 10} bytes; the manifest has {len(content)}; remove"
    with pytest.raises(ShardError, match=expected):
        shards.ShardReader(str(folder), "train")


def test_a_missing_shard_is_refused_when_opened(folder):
    shard(folder).unlink()
    with pytest.raises(ShardError, match=r"train-00001\.parquet is missing"):
        shards.ShardReader(str(folder), "train")


def test_a_tampered_shard_of_the_right_size_is_found_by_its_hash(folder):
    content = bytearray(shard(folder).read_bytes())
    content[100] ^= 1
    shard(folder).write_bytes(bytes(content))
    shards.ShardReader(str(folder), "train")
    with pytest.raises(ShardError, match=r"train-00001\.parquet has hash \w{12}; the manifest has \w{12}; remove the"):
        shards.verify_shards(str(folder))


def test_a_shard_that_cannot_be_decoded_is_named(folder):
    shard(folder).write_bytes(b"x" * shard(folder).stat().st_size)
    with pytest.raises(ShardError, match=r"train-00001\.parquet cannot be read") as caught:
        shards.ShardReader(str(folder), "train").rows([100])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 99}, r"the counts of split train .* do not add up"),
        ({"tokens": 7}, r"the counts of split train .* do not add up"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(folder, change, message):
    edit(folder, lambda values: values["splits"]["train"]["shards"][1].update(change))
    with pytest.raises(ShardError, match=message):
        shards.ShardReader(str(folder), "train")


def test_rows_of_another_number_or_length_than_in_the_manifest_are_refused(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    ids_BS = torch.zeros(100, ROW_LEN - 1, dtype=torch.int32)
    entry = shards.write_shard(str(other / "train-00001.parquet"), PackedRows(ids_BS, ids_BS))
    shard(folder).write_bytes((other / "train-00001.parquet").read_bytes())
    edit(folder, lambda values: values["splits"]["train"]["shards"][1].update(bytes=entry.bytes))
    with pytest.raises(ShardError, match=r"input_ids of fixed_size_list<.*>\[7\]; the manifest has .*\[8\]"):
        shards.ShardReader(str(folder), "train").rows([100])
    entry = shards.write_shard(str(shard(folder)), PackedRows(ids_BS[:5], ids_BS[:5]))
    edit(folder, lambda values: values["splits"]["train"]["shards"][1].update(bytes=entry.bytes))
    with pytest.raises(ShardError, match=r"train-00001\.parquet has 5 rows; the manifest has 100"):
        shards.ShardReader(str(folder), "train").rows([100])


def test_a_folder_that_pack_did_not_complete_is_refused(folder, tmp_path):
    edit(folder, lambda values: values.update(format_version=99))
    with pytest.raises(ShardError, match="has format version 99; this code reads 2"):
        shards.read_manifest(str(folder))
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match=r"manifest\.json is damaged"):
        shards.read_manifest(str(folder))
    with pytest.raises(ShardError, match=r"holds no manifest\.json; give a folder that pack completed"):
        shards.read_manifest(str(tmp_path / "nowhere"))


def edit(folder, change):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
