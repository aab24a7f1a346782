"""Links on this disk count as their targets: in a corpus, a bundle, a tokenizer's folder, a folder of shards."""

import shutil
from pathlib import Path

import pytest
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.packing import corpus
from tidar_core.artifacts import shards
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import verify_bundle
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with two files in `real` and an empty folder for links to them."""
    for name in ("real/a.txt", "real/sub/b.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "corpus").mkdir()
    return tmp_path


def names(*given, **settings):
    return [entry.name for entry in locations.list_files(*map(str, given), **settings)]


def as_cached(folder, cache):
    """A copy in the layout of Hugging Face's cache: links in snapshots/HASH to files in blobs named by hash."""
    snapshot, blobs = cache / "snapshots/0123abcd", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / f"{number:064x}")
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(link.relative_to(cache).parts) - 1
        link.symlink_to(Path(*[".."] * depth) / "blobs" / f"{number:064x}")
    return snapshot


def test_a_link_to_a_file_counts_as_the_file_under_the_links_name(folder):
    (folder / "corpus/x.txt").symlink_to("../real/a.txt")
    (folder / "corpus/y.txt").symlink_to("x.txt")
    (folder / "corpus/z").symlink_to("../real/a.txt")
    found = locations.list_files(str(folder / "corpus"), ("*.txt",))
    assert [(entry.name, entry.size) for entry in found] == [("x.txt", 10), ("y.txt", 10)]
    assert [locations.read_text(entry.uri) for entry in found] == ["real/a.txt", "real/a.txt"]
    real = locations.list_files(str(folder / "real/a.txt"))[0]
    assert {entry.version for entry in found} == {real.version}
    (folder / "real/a.txt").write_text("other")
    assert locations.list_files(str(folder / "corpus"), ("*.txt",))[0].version != real.version


def test_links_to_folders_are_followed_and_links_that_lead_back_are_skipped(folder):
    (folder / "corpus/linked").symlink_to(folder / "real")
    (folder / "real/up").symlink_to("..")
    (folder / "real/sub/self").symlink_to(".")
    (folder / "corpus/loop").symlink_to(folder / "corpus")
    assert names(folder / "corpus") == ["linked/a.txt", "linked/sub/b.txt"]
    (folder / "whole").symlink_to(folder / "corpus")
    assert names(folder / "whole") == names(folder / "corpus")


def test_a_glob_matches_links_too(folder):
    (folder / "corpus/x.txt").symlink_to("../real/a.txt")
    (folder / "corpus/linked").symlink_to(folder / "real")
    assert names(folder / "corpus/*.txt") == ["x.txt"]
    assert names(folder / "corpus/**/*.txt") == ["linked/a.txt", "linked/sub/b.txt", "x.txt"]
    assert names(folder / "*/linked/?.txt") == ["corpus/linked/a.txt"]
    assert names(folder / "corpus/linked/[a-c].txt") == ["a.txt"]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "data", "v1.0"])
def test_a_broken_link_is_refused_with_its_name(folder, name):
    (folder / "corpus/good.txt").write_text("good")
    (folder / "corpus" / name).symlink_to("../gone")
    with pytest.raises(
        UserError, match=rf"corpus/{name} is a link to \.\./gone, which does not exist; repair the link, or"
    ):
        corpus.list_corpus(str(folder / "corpus"), ("*.txt",))
    assert [entry.name for entry in corpus.list_corpus(str(folder / "corpus"), ("*.txt",), (name,))] == ["good.txt"]
    with pytest.raises(UserError, match="is a link to"):
        corpus.list_corpus(str(folder / "corpus" / name), ("*.txt",))


def test_a_link_to_itself_is_refused_and_broken_links_that_were_not_requested_are_skipped(folder):
    (folder / "corpus/good.txt").write_text("good")
    for name in (".#lock", "lib.so", "picture.png"):
        (folder / "corpus" / name).symlink_to("../gone")
    assert names(folder / "corpus", patterns=("*.txt",)) == ["good.txt"]
    (folder / "corpus/round.txt").symlink_to("round.txt")
    with pytest.raises(UserError, match=r"round\.txt is a link to round\.txt, which does not exist"):
        names(folder / "corpus", patterns=("*.txt",))


def test_a_bundle_of_links_has_the_same_identity(tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    snapshot = as_cached(bundle, tmp_path / "cache")
    assert verify_bundle(snapshot) == verify_bundle(bundle)
    assert load_bundle(snapshot).info == load_bundle(bundle).info
    assert load_tokenizer(snapshot).fingerprint == load_tokenizer(bundle).fingerprint
    (tmp_path / "link").symlink_to(snapshot)
    assert load_bundle(tmp_path / "link").info == load_bundle(bundle).info
    weights = snapshot / "model.safetensors"
    weights.resolve().unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is a link to .*blobs/.*, which does not exist"):
        load_bundle(snapshot)


def test_shards_that_are_links_have_the_same_identity(tmp_path):
    save_tiny_shards(tmp_path / "shards")
    snapshot = as_cached(tmp_path / "shards", tmp_path / "cache")
    assert shards.verify_shards(str(snapshot)) == shards.verify_shards(str(tmp_path / "shards"))
    assert len(shards.ShardReader(str(snapshot))) == 24
