"""Stages of a replica that is not ready yet are visible to other processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from compiled_kernels import copy_kernels
from tiny import save_lost_bundle, save_tiny_bundle

from serve_apps import app
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.replica.engine import Engine
from serve_apps.replica.engine_client import EngineClient
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from serve_apps.telemetry import start_stage
from tidar_core.errors import BundleError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(save_tiny_bundle(tmp_path_factory.mktemp("start") / "bundle"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    copy_kernels(os.environ["XDG_CACHE_HOME"], tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_start_reports_its_stages_and_how_long_timing_may_take(bundle):
    lines = []
    settings = ServeSettings(model=bundle, mode="auto", rows=2, timing_seconds=3)
    Engine(resolve_model(settings)[0], lines.append).stop()
    assert lines[0].startswith("memory of a replica on cpu, at most: weights ")
    assert lines[1] == f"weights are loaded from {bundle}"
    assert lines[2].startswith("decode steps are timed, for 3 s at most")
    assert lines[-2] == "a first request is decoded"
    assert lines[-1].startswith("ready to decode after ")


def test_a_replica_logs_the_stages_of_its_start(bundle, caplog):
    caplog.set_level("INFO", logger="ray.serve")
    DecoderApp(resolve_model(ServeSettings(model=bundle, mode="two-pass", rows=2, own_process=False))[0])
    logged = [record.getMessage() for record in caplog.records]
    for stage in ("memory of a replica on cpu", "weights are loaded from", "ready to decode after"):
        assert any(stage in line for line in logged), logged


def test_a_start_prints_each_stage_once(monkeypatch, capsys):
    stages = iter([None, "weights are loaded", "weights are loaded", "ready to decode"])
    ended = threading.Event()

    def latest():
        stage = next(stages, "ready to decode")
        if stage == "ready to decode":
            ended.set()
        return stage

    monkeypatch.setattr(start_stage, "latest", latest)
    monkeypatch.setattr(app, "STAGE_LOOK_SECONDS", 0.01)
    with app._stages_printed():
        assert ended.wait(10)
    assert capsys.readouterr().err == "tidar: weights are loaded\ntidar: ready to decode\n"


@pytest.mark.slow
def test_a_process_of_its_own_reports_the_same_stages(bundle):
    lines = []
    settings = ServeSettings(model=bundle, mode="two-pass", rows=2)
    engine = EngineClient(resolve_model(settings)[0], print, lines.append)
    engine.stop()
    assert [line.split()[0] for line in lines] == ["memory", "weights", "a", "ready"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [Engine, lambda served: EngineClient(served, print)], ids=["here", "own process"])
def test_a_model_of_nan_never_starts(tmp_path, start):
    lost = str(save_lost_bundle(tmp_path / "lost"))
    served = resolve_model(ServeSettings(model=lost, mode="two-pass", rows=2))[0]
    with pytest.raises(BundleError, match="weights that are not finite") as caught:
        start(served)
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_the_latest_stage_of_any_replica_is_read_by_all_processes_of_the_cluster(ray_cluster):
    import ray

    assert start_stage.latest() is None
    start_stage.publish("one", "weights are loaded")
    start_stage.publish("two", "decode steps are timed")
    assert ray.get(ray.remote(start_stage.latest).remote()) == "decode steps are timed"
    start_stage.clear("two")
    assert start_stage.latest() == "weights are loaded"
    start_stage.clear("one")
    assert start_stage.latest() is None


def test_without_ray_publishing_a_stage_has_no_effect():
    code = "from serve_apps.telemetry import start_stage as s; s.publish('a', 'b'); s.clear('a'); print(s.latest())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
