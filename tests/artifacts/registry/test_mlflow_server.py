"""Versions, aliases, runs and their files on a real server with files on disk or in an object store."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from ports import unused_port

from tidar_core.artifacts.model.bundle_info import BundleInfo
from tidar_core.artifacts.registry import model_registry, runs
from tidar_core.artifacts.registry.mlflow_client import client_of
from tidar_core.errors import RegistryError

pytestmark = [pytest.mark.slow]

CHANGE = """
import sys
from tidar_core.artifacts.registry import model_registry, runs
uri, name, *changes = sys.argv[1:]
model_registry.list_versions(uri, name)
print("ready", flush=True)
sys.stdin.readline()
for change in changes:
    kind, version = change.split()
    if kind == "promote":
        model_registry.promote(uri, name, int(version))
    elif kind == "try":
        model_registry.set_challenger(uri, name, int(version))
    else:
        model_registry.withdraw(uri, name, "challenger", int(version), "slow")
"""


@contextmanager
def served(folder, files):
    """Address of a server on SQLite that keeps files at `files`."""
    port = unused_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", files]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    with served(folder, str(folder / "files")) as uri:
        yield uri


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory, s3_endpoint):
    import boto3

    boto3.client("s3").create_bucket(Bucket="mlflow-files")
    with served(tmp_path_factory.mktemp("s3"), "s3://mlflow-files/root") as uri:
        yield uri
    kept = boto3.client("s3").list_objects_v2(Bucket="mlflow-files")["Contents"]
    assert [entry["Key"].rsplit("/")[-1] for entry in kept] == ["report.md"]


def wait_for(url, process, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def publish(uri, name, number, run_id=None):
    info = BundleInfo(
        block_len=4, mask_id=9, objective="dual", lineage={"shards": "s"}, files={}, bundle_hash=f"hash-{number}"
    )
    return model_registry.publish_version(
        uri, name, f"/bundles/{number}", info, {"ar_loss": 1.5}, run_id, tags={"a": "b"}
    )


@pytest.mark.parametrize("kind", ["s3_server", "server"])
def test_a_server_keeps_runs_with_their_files_and_versions_with_their_runs(kind, request, tmp_path):
    server = request.getfixturevalue(kind)
    (tmp_path / "report.md").write_text("good")
    trained = runs.start_run(server, "river", "train b", {"steps": 3}, {"station": "train"})
    runs.log_metrics(server, trained, {"loss": 1.0}, 3)
    runs.log_artifact(server, trained, str(tmp_path / "report.md"))
    assert runs.find_run(server, "train", "hash-1") is None
    runs.end_run(server, trained, tags={"bundle_hash": "hash-1"})
    assert runs.find_run(server, "train", "hash-1") == trained
    assert runs.find_run(server, "evaluate", "hash-1") is None
    client = client_of(server)
    assert [entry.path for entry in client.list_artifacts(trained)] == ["report.md"]
    assert Path(client.download_artifacts(trained, "report.md", str(tmp_path / "kept"))).read_text() == "good"
    assert [publish(server, "run", 1, trained), publish(server, "run", 2), publish(server, "run", 1)] == [1, 2, 1]
    assert model_registry.resolve(server, "models:/run/1") == model_registry.RegistryVersion(
        "run", 1, "/bundles/1", "hash-1"
    )
    assert client.get_model_version("run", "1").run_id == trained


def test_a_server_promotes_rolls_back_and_lists(server):
    for number in (1, 2, 3):
        publish(server, "walk", number)
        model_registry.promote(server, "walk", number)
    model_registry.set_challenger(server, "walk", 1)
    assert model_registry.rollback(server, "walk") == 2
    listed = model_registry.list_versions(server, "walk")
    assert [(one.version, one.status) for one in listed] == [
        (3, ""), (2, "champion"), (1, "challenger, earlier champion")
    ]  # fmt: skip
    assert (listed[0].bundle, listed[0].bundle_hash, listed[0].gates) == ("/bundles/3", "hash-3", {"ar_loss": 1.5})


def race(uri, name, *hands):
    """Runs processes that make one change after another and all start at once."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CHANGE, uri, name, *hand], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        for hand in hands
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0] * len(processes)


def test_promotions_that_race_leave_one_champion_and_rollbacks_through_all_of_them(server):
    for number in range(1, 6):
        publish(server, "race", number)
    model_registry.promote(server, "race", 1)
    race(server, "race", ("promote 2", "promote 4"), ("promote 3", "promote 5"))
    champions = [model_registry.resolve(server, "models:/race@champion").version]
    assert champions[0] in (4, 5)
    for _ in range(4):
        champions.append(model_registry.rollback(server, "race"))
        assert model_registry.resolve(server, "models:/race@champion").version == champions[-1]
    assert sorted(champions) == [1, 2, 3, 4, 5], "each promoted version was champion once"
    assert champions[-1] == 1
    assert champions.index(4) < champions.index(2)
    assert champions.index(5) < champions.index(3)
    with pytest.raises(RegistryError, match="version 1 is its first champion"):
        model_registry.rollback(server, "race")


def test_a_withdrawal_that_races_takes_the_alias_from_no_later_challenger(server):
    for number in range(1, 6):
        publish(server, "trial", number)
    model_registry.set_challenger(server, "trial", 1)
    race(server, "trial", [f"withdraw {v}" for v in (1, 2, 3, 4)], [f"try {v}" for v in (2, 3, 4, 5)])
    assert model_registry.aliases(server, "trial") == {"challenger": 5}
    model_registry.withdraw(server, "trial", "challenger", 5, "slow")
    assert model_registry.aliases(server, "trial") == {}


def test_an_alias_that_was_set_by_hand_is_kept(server):
    for number in (1, 2):
        publish(server, "hand", number)
    client_of(server).set_registered_model_alias("hand", "champion", "1")
    model_registry.promote(server, "hand", 2)
    assert model_registry.rollback(server, "hand") == 1
