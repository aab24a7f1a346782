"""Listing, staging and publishing, on this disk and on the tests' own S3 server."""

import gc
import gzip
import hashlib

import fsspec
import pytest
import zstandard

from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.compressed import open_decompressed
from tidar_core.errors import StorageError, UserError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty folder, on each kind of location."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")


def fill(root, *names):
    for name in names:
        locations.write_bytes(locations.join(root, name), name.encode())


def names(root):
    return [entry.name for entry in locations.list_files(root)]


def test_files_are_listed_by_name_and_pattern_with_compressed_forms_and_without_hidden_ones(root):
    fill(root, "b.txt", "a/z.md.gz", "a/y.jsonl.zst", "c.png", ".hidden.txt", ".git/d.txt")
    found = locations.list_files(root, ("*.txt", "*.md", "*.jsonl"))
    assert [(entry.name, entry.size) for entry in found] == [("a/y.jsonl.zst", 13), ("a/z.md.gz", 9), ("b.txt", 5)]
    assert [locations.read_text(entry.uri) for entry in found] == ["a/y.jsonl.zst", "a/z.md.gz", "b.txt"]


def test_a_file_and_a_glob_are_taken_as_they_are(root):
    fill(root, "logs/b.log", "logs/a.log", "logs/a.txt")
    assert [entry.name for entry in locations.list_files(locations.join(root, "logs/a.log"), ("*.txt",))] == ["a.log"]
    assert [entry.name for entry in locations.list_files(locations.join(root, "logs/*.log"))] == ["a.log", "b.log"]
    assert locations.list_files(locations.join(root, "nowhere")) == []


def test_a_changed_file_has_another_version(root):
    fill(root, "a.txt")
    before = locations.list_files(root)[0].version
    assert locations.list_files(root)[0].version == before
    locations.write_bytes(locations.join(root, "a.txt"), b"other")
    assert locations.list_files(root)[0].version != before


def test_compression_is_read_by_suffix(root):
    text = "ünïcode\n" * 1000
    packed = {"a.txt": text.encode(), "b.gz": gzip.compress(text.encode()), "c.zst": zstandard.compress(text.encode())}
    for name, content in packed.items():
        locations.write_bytes(locations.join(root, name), content)
        with open_decompressed(locations.join(root, name)) as stream:
            assert stream.read().decode() == text


def test_the_hash_and_the_size_are_computed_from_the_bytes(root):
    fill(root, "a.txt")
    assert locations.sha256(locations.join(root, "a.txt")) == hashlib.sha256(b"a.txt").hexdigest()
    assert locations.size(locations.join(root, "a.txt")) == 5


def test_a_staged_folder_appears_whole_and_replaces_an_older_one(root):
    target = locations.join(root, "out")
    with output_folder.staged_folder(target, "done.json") as staged:
        fill(staged, "x/old.txt", "done.json")
        assert not locations.exists(target)
    assert names(root) == ["out/done.json", "out/x/old.txt"]
    with output_folder.staged_folder(target, "done.json") as staged:
        fill(staged, "new.txt", "done.json")
    assert names(target) == ["done.json", "new.txt"]


def test_nothing_half_written_is_left_when_an_exception_passes(root):
    target = locations.join(root, "out")
    fill(target, "done.json", "old.txt")
    with pytest.raises(ZeroDivisionError), output_folder.staged_folder(target, "done.json") as staged:  # noqa: PT012
        fill(staged, "new.txt")
        raise ZeroDivisionError
    files = locations._filesystem(root).find(locations._path(root))
    assert sorted(locations.name_of(path) for path in files) == ["done.json", "old.txt"]


def test_a_file_whose_writer_fails_never_appears_and_an_older_one_stays(root):
    fill(root, "old.txt")
    for name in ("old.txt", "new.txt"):
        with pytest.raises(ZeroDivisionError), locations.open_write(locations.join(root, name)) as sink:  # noqa: PT012
            sink.write(b"x" * 2**23)  # more bytes than an object store's client buffers
            raise ZeroDivisionError
    gc.collect()  # an upload that was not discarded would be completed here
    assert locations.names_in(root) == ["old.txt"]
    assert locations.read_text(locations.join(root, "old.txt")) == "old.txt"


def test_a_folder_half_replaced_on_an_object_store_may_be_replaced_again(s3_bucket):
    target = f"{s3_bucket}/out"
    fill(target, output_folder.REPLACING, "new-1.txt")  # neither marker exists
    fill(f"{s3_bucket}/.work/shards", "new-1.txt", "new-2.txt", "done.json")
    output_folder.put_in_place(f"{s3_bucket}/.work/shards", target, "done.json")
    assert sorted(locations.names_in(target)) == ["done.json", "new-1.txt", "new-2.txt"]


def test_unfinished_files_of_a_killed_writer_are_not_put_in_place(tmp_path):
    fill(str(tmp_path / "staged"), "done.json", "a/b.txt", "a/.b.txt.0123abcd")
    output_folder.put_in_place(str(tmp_path / "staged"), str(tmp_path / "out"), "done.json")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a", "b.txt", "done.json"]


def test_a_missing_bucket_is_reported_in_one_line(s3_endpoint):
    for use in (locations.read_bytes, locations.sha256, lambda uri: locations.write_bytes(uri, b"x")):
        with pytest.raises(UserError, match=r"s3://no-such-bucket-9/a cannot be reached: .*bucket") as caught:
            use("s3://no-such-bucket-9/a")
        assert "\n" not in str(caught.value)


def test_a_folder_without_the_marker_is_never_replaced(root):
    target = locations.join(root, "home")
    fill(target, "thesis.txt")
    with pytest.raises(UserError, match=r"home exists and holds no done\.json"):  # noqa: SIM117
        with output_folder.staged_folder(target, "done.json"):
            pytest.fail("work must not start")
    assert names(target) == ["thesis.txt"]


def test_a_local_copy_is_the_folder_itself_or_a_download_that_follows_changes(root, tmp_path):
    fill(root, "m/a.txt", "m/b/c.txt")
    copy = locations.local_copy(locations.join(root, "m"), tmp_path / "cache")
    assert (copy / "b" / "c.txt").read_text() == "m/b/c.txt"
    locations.write_bytes(locations.join(root, "m", "a.txt"), b"changed")
    assert (locations.local_copy(locations.join(root, "m"), tmp_path / "cache") / "a.txt").read_text() == "changed"


def test_an_upload_has_the_files_of_the_folder(root, tmp_path):
    source = tmp_path / "source"
    fill(str(source), "a.txt", "b/c.txt")
    locations.upload_folder(source, locations.join(root, "up"))
    assert names(locations.join(root, "up")) == ["a.txt", "b/c.txt"]


def test_an_unknown_scheme_is_refused_with_its_name():
    with pytest.raises(UserError, match="scheme 'gopher'; give a local path, file:// or s3://"):
        locations.exists("gopher://hole/a")


def test_an_endpoint_that_does_not_answer_is_reported_in_one_line(monkeypatch):
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="s3://nowhere/a cannot be reached") as caught:
        locations.read_bytes("s3://nowhere/a")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "\n" not in str(caught.value)


def test_a_store_that_refuses_a_listing_is_one_line(s3_bucket, monkeypatch):
    """A listing is read at once, within the reach of the handler of refusals."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # its clients keep their credentials
    try:
        for read in (locations.list_files, locations.local_copy):
            with pytest.raises(StorageError, match=r"cannot be reached: .*; check the credentials") as caught:
                read(f"{s3_bucket}/without-credentials")
            assert "\n" not in str(caught.value)
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
