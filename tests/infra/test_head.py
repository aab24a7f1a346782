"""Stages run as jobs, and the service as a Serve config, on a head of `ray start --head`."""

import json
import time
import urllib.error
import urllib.request

import pytest
import yaml
from ports import unused_port
from tiny import save_tiny_bundle

from serve_apps.deployment import serve_config
from serve_apps.settings import ServeSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow]

UPLOADED = {"tidar", "tidar_core", "pipelines", "serve_apps", "infra"}
SERVE_SECONDS = 120


def submitted(head, stage, job):
    """The output of a job that has succeeded."""
    done = head.command(
        "ray", "job", "submit", "--working-dir", ".", "--runtime-env", "infra/runtime_env.yaml", "--",
        "python", "-m", "tidar", stage, str(job), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def test_pack_train_and_evaluate_run_by_ray_job_submit(head, tmp_path, text_corpus):
    jobs = {
        "pack": {
            "corpus": str(text_corpus), "include": ["*"], "output": str(tmp_path / "shards"),
            "tokenizer": {"vocab_size": 300}, "row_len": 32, "held_out": 0.3, "workers": 1,
        },
        "train": {
            "shards": str(tmp_path / "shards"), "output": str(tmp_path / "bundle"), "shape": "tiny", "block_len": 4,
            "steps": 2, "rows_per_step": 4, "rows_per_forward": 4, "precision": "fp32",
            "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        },
        "evaluate": {
            "bundle": str(tmp_path / "bundle"), "shards": str(tmp_path / "shards"), "output": str(tmp_path / "report"),
            "prompts": 2, "prompt_len": 8, "max_tokens": 8, "loss_rows": 4, "repeats": 1,
        },
    }  # fmt: skip
    printed = {}
    for stage, job in jobs.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(job))
        printed[stage] = submitted(head, stage, path)
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert printed["pack"]["identity"] == manifest["identity"] == report["shards"]
    assert printed["train"]["bundle_hash"] == report["bundle_hash"]
    assert report["greedy_equal"] is True


def test_a_job_carries_the_code_and_nothing_else(head):
    """Packages of earlier jobs on the head have no history, artefacts, environment or tests."""
    packages = [
        path.parents[1] for path in head.temp.glob("session_2*/runtime_resources/working_dir_files/*/tidar/__main__.py")
    ]
    assert packages
    for package in packages:
        assert {path.name for path in package.iterdir()} == UPLOADED
        assert (package / "tidar_core/artifacts/shards.py").is_file()
        assert (package / "infra/jobs/pack.full.yaml").is_file()
        assert sum(path.stat().st_size for path in package.rglob("*.*") if "__pycache__" not in path.parts) < 4 * 2**20


def test_serve_deploy_starts_the_service_from_the_written_config(head, tmp_path):
    port = unused_port()
    settings = ServeSettings(
        model=str(save_tiny_bundle(tmp_path / "tiny-model")), port=port, mode="single-pass", num_cpus=1, rows=2
    )
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_config(settings)))
    done = head.command("serve", "deploy", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    _wait_until_ready(f"http://127.0.0.1:{port}/ready")
    body = json.dumps({"model": "tiny-model", "prompt": "def ", "max_tokens": 4, "temperature": 0}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    status = yaml.safe_load(head.command("serve", "status").stdout)
    assert status["applications"]["tidar"]["status"] == "RUNNING"


def _wait_until_ready(url):
    deadline = time.monotonic() + SERVE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < deadline
            time.sleep(0.3)
