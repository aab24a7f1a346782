"""A pack job that was killed and is started again does the rest, with the same shards."""

import json
import os

import pytest
from killed_jobs import kill_when
from pack_jobs import job, shard_bytes

from pipelines.packing.pack import pack
from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations

DOCUMENTS = [f"document {n}: " + "lorem ipsum dolor " * (n % 5 + 1) for n in range(160)]


@pytest.fixture
def corpus(tmp_path):
    """One file of JSON lines for each ten documents."""
    for first in range(0, len(DOCUMENTS), 10):
        lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[first : first + 10]]
        path = tmp_path / f"corpus/{first:03d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    return tmp_path / "corpus"


def spoil(path):
    """Other text in as many bytes, at the same time: whoever reads it again packs something else."""
    before = path.stat()
    path.write_text(path.read_text().replace("lorem", "LOREM"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.ray
def test_a_killed_job_started_again_keeps_its_parts_and_shards_and_ends_with_the_bytes_of_an_unbroken_one(
    ray_cluster, corpus, tokenizer_folder, tmp_path
):
    settings = {"unit_bytes": 600, "rows_per_shard": 8, "dedup": True}
    whole = pack(job(corpus, tmp_path / "whole", tokenizer_folder, **settings))
    broken = job(corpus, tmp_path / "broken", tokenizer_folder, **settings)

    def left(pattern):
        return sorted(tmp_path.glob(f".broken.*/{pattern}"))

    kill_when(lambda: len(left("units-600/tokens-*.json")) >= 3, pack, broken)
    marks = left("units-600/tokens-*.json")
    files = sorted(corpus.iterdir())
    assert 3 <= len(marks) < len(files)
    spoil(files[0])
    for torn in ("whole", "held_out"):  # what a writer that knows no other name would have left of the last unit
        (marks[0].parent / f"{torn}-{len(files) - 1:07d}-00000.parquet").write_bytes(b"PAR1 torn")
    kill_when(lambda: len(left("marks/train-*.json")) >= 3, pack, broken)
    kept = {path.name[: -len(".json")] for path in left("marks/train-*.json")}
    assert 3 <= len(kept) < len(whole.splits["train"].shards)
    written = {name: left(f"shards/{name}")[0].stat() for name in kept}
    for file in files[1:]:
        spoil(file)
    assert pack(broken) == whole
    assert shard_bytes(tmp_path / "broken") == shard_bytes(tmp_path / "whole")
    for name, before in written.items():
        after = (tmp_path / "broken" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "corpus", "whole"]


@pytest.mark.ray
def test_a_killed_job_goes_on_on_an_object_store(ray_cluster, s3_bucket, corpus, tokenizer_folder, tmp_path):
    settings = {"unit_bytes": 600, "rows_per_shard": 200}
    whole = pack(job(corpus, tmp_path / "whole", tokenizer_folder, **settings))
    broken = job(corpus, f"{s3_bucket}/broken", tokenizer_folder, **settings)

    def marks():
        folders = [name for name in locations.names_in(s3_bucket) if name.startswith(".broken.")]
        names = [name for folder in folders for name in locations.names_in(f"{s3_bucket}/{folder}/units-600")]
        return [name for name in names if name.startswith("tokens-")]

    kill_when(lambda: len(marks()) >= 2, pack, broken)
    spoil(min(corpus.iterdir()))
    assert pack(broken) == whole
    assert shards.verify_shards(f"{s3_bucket}/broken") == whole
    assert locations.names_in(s3_bucket) == ["broken"]


@pytest.mark.ray
def test_a_changed_job_begins_anew_and_removes_what_a_killed_one_left(ray_cluster, corpus, tokenizer_folder, tmp_path):
    marks = tmp_path / ".out.0123456789abcdef/units-600"
    marks.mkdir(parents=True)
    (marks / "tokens-0000000.json").write_text('{"of": "another job"}')
    for name in (".out.0123456789abcdeX", ".out.0123", ".other.0123456789abcdef"):
        (tmp_path / name).mkdir()
    pack(job(corpus, tmp_path / "out", tokenizer_folder, unit_bytes=600))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.0123456789abcdef", ".out.0123", ".out.0123456789abcdeX", "corpus", "out",
    ]  # fmt: skip


@pytest.mark.ray
def test_a_swap_that_was_interrupted_is_finished_by_the_next_start_through_a_link_too(
    ray_cluster, corpus, tokenizer_folder, tmp_path
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    given = job(corpus, tmp_path / "out", tokenizer_folder, unit_bytes=600)
    whole = pack(given)
    before = shard_bytes(tmp_path / "disk/out")
    real = tmp_path / "disk/out"
    real.rename(tmp_path / f"disk/.out.{whole.identity[:16]}.old")  # where the new one was not yet written
    assert pack(given) == whole
    real.rename(tmp_path / f"disk/.out.{'0' * 16}.old")  # where another job's was not
    (corpus / "last.jsonl").write_text('{"text": "one more"}')
    assert pack(given).identity != whole.identity
    assert shard_bytes(real) != before
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
