"""Checkpoints at rest: only whole ones are picked, the right ones stay, writing does not hold training up."""

import math
import multiprocessing
import signal
import time
from dataclasses import replace

import pytest
import torch

from pipelines.training.checkpoints import CheckpointStore, Cursor, find_checkpoint, read_part, whole_checkpoints
from tidar_core.artifacts.store import locations
from tidar_core.errors import UserError

CURSOR = Cursor(step=0, updates=0, run={"seed": 0}, shards="s", start="w", model={})


def tensors(value, size=100):
    return {"layer.weight": {"weight": torch.full((size,), float(value)), "exp_avg": torch.arange(3.0)}}


def save(store, step, *, parts=2, loss=None, only=None):
    for part in range(parts) if only is None else only:
        cursor = replace(CURSOR, step=step, validation_loss=loss)
        store.write(tensors(10 * step + part), cursor, part=part, parts=parts)
        store.wait()


def steps(store):
    return [checkpoint.cursor.step for checkpoint in whole_checkpoints(store.uri)]


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """An empty store in each kind of location."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")
    return CheckpointStore(f"{root}/run/checkpoints", keep_last=2, keep_best=1)


def part_of(store, step, part=0):
    return locations.join(store.uri, f"step-{step:08d}/part-{part:05d}-of-00002.pt")


def test_what_is_read_is_what_was_written(store):
    save(store, 5)
    found = store.newest()
    assert found.cursor == replace(CURSOR, step=5)
    assert [note.names for note in found.notes] == [("layer.weight",), ("layer.weight",)]
    for part, note in enumerate(found.notes):
        read = read_part(found, note)["layer.weight"]
        assert torch.equal(read["weight"], torch.full((100,), 50.0 + part))
        assert read["exp_avg"].tolist() == [0, 1, 2]


def test_a_checkpoint_that_lacks_a_part_is_never_picked_and_is_cleared_away(store):
    save(store, 5)
    save(store, 6, only=[0])
    assert (steps(store), store.newest().cursor.step) == ([5], 5)
    store.clear_unfinished()
    assert {entry.name.split("/")[0] for entry in locations.list_files(store.uri)} == {"step-00000005"}


def test_a_truncated_part_is_never_picked(store):
    save(store, 5)
    save(store, 6)
    content = locations.read_bytes(part_of(store, 6, 1))
    locations.write_bytes(part_of(store, 6, 1), content[:-1])
    assert store.newest().cursor.step == 5
    assert find_checkpoint(store.uri.removesuffix("/checkpoints")).cursor.step == 5


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"[" * 10**5], ids=["empty", "cut", "list", "{}", "deep"])
def test_a_checkpoint_with_a_damaged_note_is_never_picked(store, content):
    save(store, 5)
    save(store, 6)
    locations.write_bytes(part_of(store, 6, 1).replace(".pt", ".json"), content)
    assert store.newest().cursor.step == 5


def test_a_flipped_bit_is_named_when_it_is_read(store):
    save(store, 5)
    content = bytearray(locations.read_bytes(part_of(store, 5)))
    content[len(content) // 2] ^= 1
    locations.write_bytes(part_of(store, 5), bytes(content))
    found = store.newest()
    with pytest.raises(UserError, match=r"part-00000-of-00002\.pt has hash") as caught:
        read_part(found, found.notes[0])
    assert "\n" not in str(caught.value)


def test_the_last_two_and_the_best_one_stay(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(store, step, loss=loss)
        store.prune()
    assert steps(store) == [2, 4, 5]
    assert len(locations.list_files(store.uri)) == 3 * 4


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, loss):
    store = CheckpointStore(str(tmp_path), keep_last=1, keep_best=1)
    for step, found in ((1, 3.0), (2, loss), (3, 2.0), (4, loss), (5, 2.5)):
        save(store, step, loss=found)
    store.prune()
    assert steps(store) == [3, 5]


def test_older_checkpoints_stay_until_the_next_is_written(tmp_path):
    store = CheckpointStore(str(tmp_path), keep_last=1, keep_best=0)
    kept = []
    for step in (1, 2, 3):
        save(store, step)
        kept.append(steps(store))
    assert kept == [[1], [1, 2], [2, 3]]


def test_training_goes_on_while_a_part_is_written(store):
    began = time.perf_counter()
    store.write(tensors(1, size=2**23), replace(CURSOR, step=1), part=0, parts=1)
    called = time.perf_counter() - began
    assert store.busy
    assert store.newest() is None
    store.wait()
    assert called < (time.perf_counter() - began) / 2
    assert (store.busy, store.newest().cursor.step) == (False, 1)


def test_what_the_writer_met_is_raised_at_the_next_write(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = CheckpointStore(str(tmp_path / "file" / "checkpoints"), keep_last=1, keep_best=0)
    store.write(tensors(1), replace(CURSOR, step=1), part=0, parts=1)
    with pytest.raises(OSError, match="file"):
        store.write(tensors(2), replace(CURSOR, step=2), part=0, parts=1)


def write_much(uri):
    """Eight tensors of 64 MB: an upload in as many parts."""
    store = CheckpointStore(uri, keep_last=2, keep_best=0)
    much = {f"layer.{n}": {"weight": torch.full((2**24,), float(n))} for n in range(8)}
    store.write(much, replace(CURSOR, step=6), part=0, parts=1)
    store.wait()


def half_written(uri):
    """Bytes that lie below `uri` without being a file there yet: beside it, or parts of uploads that nobody ended."""
    if path := locations.local_path(uri):
        return sum(file.stat().st_size for file in path.rglob(".part-*"))
    import boto3

    client, (bucket, prefix) = boto3.client("s3"), uri.removeprefix("s3://").split("/", 1)
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return sum(
        part["Size"]
        for upload in uploads
        if upload["Key"].startswith(prefix)
        for part in client.list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", [])
    )


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_leaves_nothing_that_is_picked(store):
    save(store, 5, parts=1)
    writer = multiprocessing.get_context("spawn").Process(target=write_much, args=(store.uri,))
    writer.start()
    while writer.is_alive() and not half_written(store.uri):
        time.sleep(0.002)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert half_written(store.uri) > 0
    assert (steps(store), store.newest().cursor.step) == ([5], 5)
    store.clear_unfinished()
    assert steps(store) == [5]
    assert {entry.name.split("/")[0] for entry in locations.list_files(store.uri)} == {"step-00000005"}


def test_a_place_without_checkpoints_is_named():
    with pytest.raises(UserError, match=r"/nowhere\.run holds no whole checkpoint"):
        find_checkpoint("/nowhere.run")


def test_the_best_checkpoint_is_that_of_most_tokens_per_forward_then_of_least_loss(store):
    """Checkpoints that were decoded come before all others; of equal ones the newest."""
    for step, loss, rate in ((1, 0.1, None), (2, 3.0, 1.5), (3, 2.0, 1.4), (4, 2.5, 1.5), (5, None, None)):
        cursor = replace(CURSOR, step=step, validation_loss=loss, tokens_per_forward=rate)
        store.write(tensors(step), cursor, part=0, parts=1)
        store.wait()
        if step == 1:
            assert store.best().cursor.step == 1
    assert store.best().cursor.step == 4
    store.prune()
    assert steps(store) == [4, 5]


def test_no_checkpoint_is_best_where_nothing_was_measured(store):
    save(store, 1)
    save(store, 2, loss=math.nan)
    assert store.best() is None
