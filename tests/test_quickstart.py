"""The whole pipeline by its one command, with a small budget; a second run must reuse everything."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fast_ray_env import FAST_RAY_ENV

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
MADE = ("shards", "ar", "ar.run", "bundle", "bundle.run", "report")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def quickstart(workdir):
    command = [sys.executable, "-m", "tidar", "quickstart", "--workdir", str(workdir), "--budget-seconds", "10",
               "--port", str(free_port()), "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | FAST_RAY_ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def write_short_evaluation(workdir):
    """Write the job file of the quickstart with few and short texts; the quickstart uses a job file that it finds."""
    job = {"bundle": "bundle", "shards": "shards", "output": "report", "parent": "ar"}
    job = {name: str(workdir / folder) for name, folder in job.items()} | {
        "tracking_uri": f"sqlite:///{workdir}/mlflow.db", "prompts": 6, "max_tokens": 32, "batch": 1, "repeats": 1,
        "loss_rows": 32,
    }  # fmt: skip
    (workdir / "jobs").mkdir(parents=True)
    (workdir / "jobs/evaluate.yaml").write_text(yaml.safe_dump(job))


def test_from_real_text_to_a_served_token_and_again_without_doing_it_twice(tmp_path):
    write_short_evaluation(tmp_path / "work")
    first = quickstart(tmp_path / "work")
    assert first["prompts"] == 6
    assert first["documents"] > 500
    assert first["tokens"] > 1_000_000
    assert first["rows"] == pytest.approx(first["tokens"] / 256, abs=2)
    assert first["ar_loss"] < 6.3  # a guess over 512 tokens is 6.24; untrained models are above
    assert first["greedy_equal"] is True
    assert first["tokens_per_forward"] >= 1.0
    assert first["speed_over_ar"] > 0
    assert (first["registry_version"], first["alias"]) == (1, "champion")
    assert len(first["completions"]) == 3
    assert all(isinstance(text, str) and text for text in first["completions"])
    made = {path: path.stat().st_mtime_ns for name in MADE for path in (tmp_path / "work" / name).rglob("*")}
    again = quickstart(tmp_path / "work")
    assert len(made) > 20
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for same in ("documents", "tokens", "rows", "bundle", "registry_version", "completions", "ar_loss"):
        assert again[same] == first[same], same
