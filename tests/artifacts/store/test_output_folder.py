"""An output is replaced whole: through links, and after a job was killed during the swap."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.output_folder import finish_swap, put_in_place, read_mark, staged_folder, write_mark
from tidar_core.errors import StorageError, UserError

MARKER = "done.json"
KILLED = """
import os, pathlib, shutil, signal, sys

staged, target, survived = sys.argv[1], sys.argv[2], int(sys.argv[3])
from tidar_core.artifacts.store import output_folder

def counted(real):
    def call(*given, **settings):
        global survived
        if survived == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        survived -= 1
        return real(*given, **settings)
    return call

pathlib.Path.rename = counted(pathlib.Path.rename)
shutil.rmtree = counted(shutil.rmtree)
output_folder.put_in_place(staged, target, "done.json")
"""


def fill(root, *names):
    for name in names:
        locations.write_bytes(locations.join(str(root), name), name.encode())


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_output_that_is_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk/real", "old.txt", MARKER)
    (tmp_path / "out").symlink_to("disk/real")
    with staged_folder(str(tmp_path / "out"), MARKER) as staged:
        assert Path(staged).parent == tmp_path / "disk"  # a rename stays on the same disk
        fill(staged, "new.txt", MARKER)
    assert (tmp_path / "out").readlink() == Path("disk/real")
    assert left(tmp_path) == ["disk/real/done.json", "disk/real/new.txt"]


def test_an_output_that_is_a_broken_link_appears_at_the_links_target(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    with staged_folder(str(tmp_path / "out"), MARKER) as staged:
        fill(staged, MARKER)
    assert (tmp_path / "out").is_symlink()
    assert left(tmp_path) == ["disk/real/done.json"]


def test_a_link_to_a_folder_without_the_marker_is_refused(tmp_path):
    fill(tmp_path / "home", "thesis.txt")
    (tmp_path / "out").symlink_to("home")
    with pytest.raises(UserError, match=r"out exists and holds no done\.json"):  # noqa: SIM117
        with staged_folder(str(tmp_path / "out"), MARKER):
            pytest.fail("work must not start")
    assert left(tmp_path) == ["home/thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("staged", [".out.0123abcd", ".out.0123456789abcdef/shards"])
@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_job_killed_at_any_point_of_a_swap_leaves_an_output_that_the_next_start_finds(tmp_path, staged, survived):
    fill(tmp_path / "out", "old.txt", MARKER)
    fill(tmp_path / staged, "new.txt", MARKER)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / staged), str(tmp_path / "out"), str(survived)], check=False
    )
    assert done.returncode == -9
    assert (tmp_path / "out").exists() == (survived != 1)
    finish_swap(str(tmp_path / "out"), MARKER)
    if survived == 0:  # before the first rename nothing has changed, and the new folder is still staged
        assert left(tmp_path / "out") == ["done.json", "old.txt"]
        put_in_place(str(tmp_path / staged), str(tmp_path / "out"), MARKER)
    assert left(tmp_path) == ["out/done.json", "out/new.txt"]
    assert not list(tmp_path.glob(".*.old"))


def test_a_swap_whose_new_folder_is_missing_or_not_whole_is_undone(tmp_path):
    fill(tmp_path / ".out.0123abcd.old", "old.txt", MARKER)
    fill(tmp_path / ".out.0123abcd", "new.txt")
    fill(tmp_path / ".other.0123abcd.old", "theirs.txt")
    with staged_folder(str(tmp_path / "out"), MARKER) as staged:
        assert left(tmp_path / "out") == ["done.json", "old.txt"]
        fill(staged, "newer.txt", MARKER)
    assert left(tmp_path / "out") == ["done.json", "newer.txt"]
    assert (tmp_path / ".other.0123abcd.old/theirs.txt").exists()


def test_a_swap_on_an_object_store_that_was_interrupted_is_completed(s3_bucket):
    fill(f"{s3_bucket}/out", "new-1.txt", "old.txt")
    staged = f"{s3_bucket}/.out.0123abcd"
    fill(staged, "new-1.txt", "new-2.txt", MARKER)
    locations.write_json(f"{s3_bucket}/out/{output_folder.REPLACING}", {"by": staged})
    finish_swap(f"{s3_bucket}/out", MARKER)
    assert sorted(locations.names_in(f"{s3_bucket}/out")) == ["done.json", "new-1.txt", "new-2.txt"]
    assert locations.names_in(s3_bucket) == ["out"]


@dataclass
class Outcome:
    count: int


@pytest.mark.parametrize("content", ["", "[]", '{"count": "x"}', "[" * 10**5], ids=["empty", "list", "type", "deep"])
def test_a_damaged_mark_is_one_line(tmp_path, content):
    place = str(tmp_path / "a.json")
    write_mark(place, Outcome(3))
    assert read_mark(place, Outcome) == Outcome(3)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(StorageError, match=r"a\.json is damaged; remove it, and start the job again"):
        read_mark(place, Outcome)


@pytest.mark.parametrize("root", ["local", "s3"])
def test_half_written_folders_of_killed_writers_are_removed_and_no_other_folder(root, tmp_path, request):
    root = str(tmp_path) if root == "local" else request.getfixturevalue("s3_bucket")
    kept = [".out.0123456789abcdef", ".other.0123abcd", ".out.notes123"]
    for folder in (".out.0123abcd", ".out.ffffffff", *kept):
        fill(f"{root}/{folder}", "half.txt")
    with staged_folder(f"{root}/out", MARKER) as staged:
        fill(staged, MARKER)
    assert sorted(locations.names_in(root)) == sorted([*kept, "out"])
