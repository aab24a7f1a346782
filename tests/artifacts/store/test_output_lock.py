"""One job writes an output at a time; a second job's error names the holder, and a dead holder's lock is free."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tidar_core.artifacts.store import locations, output_lock
from tidar_core.errors import UserError

MARKER = "done.json"
HOLD = """
import sys, time
from tidar_core.artifacts.store import output_lock

output_lock.RENEW_SECONDS = 0.1
with output_lock.output_lock(sys.argv[1], "done.json"):
    print("held", flush=True)
    time.sleep(600)
"""
NAMED = r"another job writes .*out now \(process {pid} on {host}, since 20..-.*\); wait until it ends, stop it, or give"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, monkeypatch):
    """An empty folder, on each kind of location; leases last a second."""
    for name, seconds in {"LEASE": 1.0, "LOOK": 0.02, "SETTLE": 0.05}.items():
        monkeypatch.setattr(output_lock, f"{name}_SECONDS", seconds)
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")


@pytest.fixture
def holder(root):
    """A process that holds the lock of `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, f"{root}/out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def named(pid):
    return NAMED.format(pid=pid, host=socket.gethostname())


def held(uri):
    return output_lock.output_lock(uri, MARKER)


def left_by(root, **changes):
    """Leaves a lock on an object store that its holder does not renew."""
    stated = {"host": "elsewhere", "pid": 7, "since": "2026-01-01T00:00:00+00:00", "job": "x"} | changes
    locations.write_json(f"{root}/.out.lock", stated)


def test_a_lock_ends_with_its_job_and_leaves_nothing(root):
    for _ in range(2):
        with held(f"{root}/out"):
            assert locations.names_in(root) == [".out.lock"]
        assert locations.names_in(root) == []
    with pytest.raises(ZeroDivisionError), held(f"{root}/out"):
        raise ZeroDivisionError
    assert locations.names_in(root) == []


def test_a_second_job_is_refused_with_the_host_and_process_of_the_first(root, holder, monkeypatch):
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 60.0)  # on an object store the holder renews the lock meanwhile
    with pytest.raises(UserError, match=named(holder.pid)) as caught, held(f"{root}/out"):
        pytest.fail("two jobs at once")
    assert "\n" not in str(caught.value)
    with held(f"{root}/other"):
        assert holder.poll() is None


def test_the_lock_of_a_job_that_was_killed_is_taken_over(root, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert locations.names_in(root) == [".out.lock"]
    with held(f"{root}/out"):
        assert json.loads(locations.read_bytes(f"{root}/.out.lock"))["pid"] == os.getpid()
    assert locations.names_in(root) == []


def test_of_many_jobs_that_begin_at_once_one_holds_the_lock(root):
    start, outcomes, all_done = threading.Barrier(6), [], threading.Event()

    def note(outcome):
        outcomes.append(outcome)
        if len(outcomes) == 6:
            all_done.set()

    def run():
        start.wait()
        try:
            with held(f"{root}/out"):
                note("held")
                all_done.wait(20)
        except UserError:
            note("refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_lock, "LEASE_SECONDS", 60.0)
        patch.setattr(output_lock, "RENEW_SECONDS", 0.05)
        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(outcomes) == ["held"] + ["refused"] * 5


def test_a_link_and_its_target_have_the_same_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with held(str(tmp_path / "real")), pytest.raises(UserError, match="another job writes"):  # noqa: SIM117
        with held(str(tmp_path / "out")):
            pytest.fail("two jobs at once")


def test_on_an_object_store_a_lock_that_another_host_does_not_renew_is_taken_over_later(s3_bucket, monkeypatch):
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(output_lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(output_lock, "SETTLE_SECONDS", 0.05)
    left_by(s3_bucket)
    with held(f"{s3_bucket}/out"):
        assert json.loads(locations.read_bytes(f"{s3_bucket}/.out.lock"))["host"] == socket.gethostname()
    left_by(s3_bucket)
    renewed = threading.Timer(0.2, lambda: left_by(s3_bucket, renewed="just now"))
    renewed.start()
    with pytest.raises(UserError, match=r"process 7 on elsewhere, since 2026"), held(f"{s3_bucket}/out"):
        pytest.fail("two jobs at once")
    renewed.join()
    assert locations.names_in(s3_bucket) == [".out.lock"]  # the other host's lock stays


def test_a_lost_lock_is_not_removed_from_under_its_new_holder(s3_bucket):
    with held(f"{s3_bucket}/out"):
        left_by(s3_bucket)
    assert json.loads(locations.read_bytes(f"{s3_bucket}/.out.lock"))["host"] == "elsewhere"


def test_a_file_system_without_locks_has_leases(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(output_lock, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(output_lock, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(output_lock, "SETTLE_SECONDS", 0.01)
    with held(str(tmp_path / "out")), pytest.raises(UserError, match=named(os.getpid())):  # noqa: SIM117
        with held(str(tmp_path / "out")):
            pytest.fail("two jobs at once")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/out cannot be read or written: .*; check the path") as caught:  # noqa: SIM117
        with held(str(tmp_path / "file/out")):
            pytest.fail("work must not start")
    assert "\n" not in str(caught.value)


def test_a_swap_that_a_killed_job_left_is_finished_by_the_next_job(root):
    if root.startswith("s3"):
        locations.write_json(f"{root}/out/.replacing", {"by": f"{root}/.out.0123abcd"})
    else:
        locations.write_bytes(f"{root}/.out.0123abcd.old/{MARKER}", b"old")
    locations.write_bytes(f"{root}/.out.0123abcd/{MARKER}", b"new")
    with held(f"{root}/out"):
        assert locations.read_bytes(f"{root}/out/{MARKER}") == b"new"
    assert locations.names_in(root) == ["out"]
