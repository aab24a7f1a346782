"""Errors of a disk are one line that names the place and the reason, and nothing half-written is left."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import save_tiny_bundle

import tidar
from tidar_core.artifacts.store import locations
from tidar_core.errors import StorageError, UserError


@contextmanager
def room_for(size):
    """Limit the size of files that this process writes. As on a full disk, writing fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(words, use):
    with pytest.raises(StorageError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_file_uri_is_percent_decoded_and_names_no_other_machine(tmp_path):
    path = tmp_path / "a folder" / "50%25 ü.txt"
    uri = f"file://{tmp_path}/a%20folder/50%2525%20%C3%BC.txt"
    locations.write_bytes(uri, b"x")
    assert path.read_bytes() == b"x"
    for same in (uri, uri.replace("file://", "file://localhost"), uri.replace("file://", "file:")):
        assert locations.local_path(same) == path
        assert locations.absolute(same) == str(path)
        assert (locations.read_bytes(same), locations.name_of(same)) == (b"x", "50%25 ü.txt")
    folder = f"file://{tmp_path}/a%20folder/"
    assert (
        locations.read_bytes(locations.join(folder, "50%25 ü.txt")) == b"x"
    )  # the joined part is a plain name, not percent-encoded
    assert [entry.uri for entry in locations.list_files(folder)] == [str(path)]
    assert [entry.uri for entry in locations.list_files(f"{folder}*.txt")] == [str(path)]
    assert locations.local_path("/a%20b") == Path("/a%20b")
    with pytest.raises(UserError, match="names the machine 'host'; give file:///PATH with the whole path"):
        locations.exists("file://host/a")


def test_a_write_without_room_is_one_line_and_leaves_nothing(tmp_path):
    with room_for(1000):
        refused(
            r"a\.txt cannot be read or written: File too large; make room there, or give another place",
            lambda: locations.write_bytes(str(tmp_path / "a.txt"), bytes(2000)),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_room_is_one_line_and_leaves_the_older_one(tmp_path):
    save_tiny_bundle(tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    for size in (100, 3000):  # fails within the weights, and within the other files
        with room_for(size):
            refused(
                r"cannot be (read or )?written: .*; make room there, or give",
                lambda: save_tiny_bundle(tmp_path / "bundle"),
            )
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_place_that_cannot_be_written_or_read_is_one_line(tmp_path):
    refused(
        r"/proc/tidar/a cannot be read or written: No such file", lambda: locations.write_bytes("/proc/tidar/a", b"x")
    )
    refused(r"bundle cannot be read or written: .*; check", lambda: save_tiny_bundle(Path("/proc/tidar/bundle")))
    refused(
        r"gone cannot be read or written: No such file.*; check the path",
        lambda: locations.read_bytes(str(tmp_path / "gone")),
    )
    refused(r"cannot be read or written: Is a directory", lambda: locations.sha256(str(tmp_path)))
    refused(r"cannot be read or written: Input/output error", lambda: locations.read_bytes("/proc/self/mem"))


def test_a_disk_that_refuses_the_command_line_is_one_line(tmp_path, monkeypatch, capsys):
    def full(**_):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(tidar, "app", full)
    with pytest.raises(SystemExit) as ended:
        tidar.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed == f"tidar: {tmp_path}/x: No space left on device; check the path, its rights and the room there\n"
