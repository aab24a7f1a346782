"""Training on a real Ray cluster through real DeepSpeed: losses, curves, a killed worker, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from pipelines.training.checkpoints import whole_checkpoints
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.shards import ShardReader, read_manifest
from tidar_core.artifacts.store import locations
from tidar_core.errors import BundleError, ConfigError, ShardError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[3]


def curve(job, metric):
    """Every value logged, as (train step, value), in order of logging."""
    from mlflow import MlflowClient

    run_id = run_of(job.output)
    return [(m.step, m.value) for m in MlflowClient(job.tracking_uri).get_metric_history(run_id, metric)]


@cache
def run_of(output):
    """The MLflow run of a job that has begun; looked up once, because a look at an object store takes long."""
    return locations.read_text(output + ".run/mlflow_run_id")


def test_two_workers_lower_the_loss_and_leave_a_bundle(ar_bundle):
    losses = dict(curve(ar_bundle, "ar_loss"))
    assert list(losses) == list(range(1, 31))
    assert losses[30] < losses[1] - 0.5
    info = read_bundle_info(ar_bundle.output)
    assert info.objective == "ar"
    assert info.lineage["shards"] == read_manifest(ar_bundle.shards).identity
    bundle = load_bundle(ar_bundle.output)
    assert bundle.model.config.mask_id == info.mask_id >= bundle.tokenizer.vocab_len


def test_the_loss_curve_of_the_first_step_is_that_of_the_random_weights_on_its_rows(ar_bundle):
    from pipelines.training.train_worker import starting_model
    from tidar_core.training.losses import label_counts
    from tidar_core.training.objective import Objective
    from tidar_core.training.row_order import rows_of_step

    reader = ShardReader(ar_bundle.shards)
    model, _ = starting_model(ar_bundle, reader.manifest)
    rows = reader.rows(rows_of_step(0, rows_per_step=8, rows=len(reader), seed=0))
    objective = Objective(model, dual=False, block_len=4)
    batch = objective.batch(rows.input_ids_BS, rows.document_ids_BS)
    with torch.no_grad():
        expected = objective(batch).ar_sum / label_counts(batch)[0]
    assert dict(curve(ar_bundle, "ar_loss"))[1] == pytest.approx(expected.item(), rel=1e-5)


def test_dual_mode_starts_at_the_parents_ar_loss_and_learns_to_draft(ar_bundle, dual_bundle):
    parent = dict(curve(ar_bundle, "ar_loss"))
    ar, diffusion = (dict(curve(dual_bundle, name)) for name in ("ar_loss", "diffusion_loss"))
    assert ar[1] == pytest.approx(parent[30], abs=0.3)
    assert diffusion[60] < diffusion[1] - 0.1
    assert read_bundle_info(dual_bundle.output).lineage["start"] == read_bundle_info(ar_bundle.output).bundle_hash
    for offset in range(4):
        assert len(curve(dual_bundle, f"draft_accuracy_{offset:02d}")) == 60


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(ar_bundle):
    rates = dict(curve(ar_bundle, "learning_rate"))
    assert rates[1] == pytest.approx(5e-3 / 3)
    assert rates[3] == pytest.approx(5e-3)
    assert rates[30] == pytest.approx(5e-4)
    assert all(rates[step] > rates[step + 1] for step in range(4, 30))


def test_a_hugging_face_folder_is_a_start_and_gains_a_mask_token(train_job, shards, tmp_path):
    import transformers

    from pipelines.training.train_worker import starting_model
    from tidar_core.transformer.attention import DenseAttention
    from tidar_core.transformer.layout import causal_layout

    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    manifest = read_manifest(shards)
    assert manifest.vocab_len == 320  # no row is unused, so the mask token gets a new one
    ours, parent = starting_model(train_job("hf", shape=None, init_from=str(tmp_path)), manifest)
    assert (ours.config.mask_id, ours.config.vocab_size, parent) == (320, 384, str(tmp_path))
    ids = torch.arange(40)[None]
    layout = causal_layout(torch.zeros_like(ids))
    with torch.no_grad():
        found = ours.head(ours(ids, layout.position, DenseAttention(layout)))
        torch.testing.assert_close(found[..., :320], theirs(ids).logits, rtol=0, atol=1e-4)


def test_the_run_carries_the_job_and_where_it_came_from(ar_bundle, dual_bundle):
    from mlflow import MlflowClient

    run_id = Path(dual_bundle.output + ".run/mlflow_run_id").read_text()
    run = MlflowClient(dual_bundle.tracking_uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["alpha"] == "1.0"
    assert run.data.tags["shards"] == read_manifest(dual_bundle.shards).identity
    assert run.data.tags["start"] == read_bundle_info(ar_bundle.output).bundle_hash
    assert run.data.tags["bundle_hash"] == read_bundle_info(dual_bundle.output).bundle_hash


def test_the_run_names_the_data_that_it_reads_once_however_often_it_was_begun(dual_bundle, broken_run):
    from mlflow import MlflowClient

    # MLflow identifies data by their hash, and keeps the first location that was logged
    source = {"uri": dual_bundle.shards, "identity": read_manifest(dual_bundle.shards).identity}
    for job in (dual_bundle, broken_run):
        run_id = locations.read_text(job.output + ".run/mlflow_run_id")
        (read,) = MlflowClient(job.tracking_uri).get_run(run_id).inputs.dataset_inputs
        assert json.loads(read.dataset.source) == source
        assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]


def test_a_finished_job_is_reused_and_another_job_may_not_take_its_place(train_job, ar_bundle):
    from pipelines.training.train import train

    files = [Path(ar_bundle.output), *Path(ar_bundle.output).rglob("*"), *Path(ar_bundle.checkpoints).rglob("*")]
    before, logged = [path.stat().st_mtime_ns for path in files], curve(ar_bundle, "ar_loss")
    assert train(ar_bundle) == read_bundle_info(ar_bundle.output)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert curve(ar_bundle, "ar_loss") == logged
    with pytest.raises(ConfigError, match="another job"):
        train(train_job("ar", seed=1))


def train_workers() -> list[psutil.Process]:
    """Workers of all jobs on this cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until_some_steps_after_a_checkpoint(job, driver, logged=0) -> None:
    """Far from the next checkpoint, so what was trained since is lost; `logged` steps are of an earlier command."""

    def begun():
        return locations.exists(job.output + ".run/mlflow_run_id")

    # Each look at the object store costs processor time, which the workers need to start.
    for happened in (begun, lambda: len(curve(job, "ar_loss")) > logged, lambda: whole_checkpoints(job.checkpoints)):
        while not happened():
            assert driver.poll() is None, "the command ended before it wrote a checkpoint"
            time.sleep(0.5)
    while not (steps := curve(job, "ar_loss")[logged:]) or steps[-1][0] % job.checkpoint_every not in (1, 2, 3):
        assert driver.poll() is None, "the command ended before it could be disturbed"
        time.sleep(0.1)


def train_command(job, path, **options) -> subprocess.Popen:
    """`tidar train` of this job as a process of its own, on this cluster."""
    import ray

    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        [sys.executable, "-m", "tidar", "train", str(path)], cwd=ROOT, env=os.environ | address, **options
    )


def leave_half_a_checkpoint(job) -> str:
    """The first of two parts, with its note, of a step behind the newest checkpoint; the folder that they are in."""
    before = whole_checkpoints(job.checkpoints)[-1]
    step, name = before.cursor.step + 5, "part-00000-of-00002"
    folder = f"{job.checkpoints}/step-{step:08d}"
    note = locations.read_json(f"{before.uri}/{name}.json")
    note["cursor"]["step"] = step
    locations.write_bytes(f"{folder}/{name}.pt", locations.read_bytes(f"{before.uri}/{name}.pt"))
    locations.write_json(f"{folder}/{name}.json", note)
    return folder


@pytest.fixture(scope="module")
def broken_run(train_job, ar_bundle, s3_endpoint, tmp_path_factory):
    """The run of `dual_bundle` once more, all of it on an object store and observed in every way.

    The command is killed; given again, it goes on, and one of its workers is killed.
    """
    import boto3

    boto3.client("s3").create_bucket(Bucket="broken")
    locations.upload_folder(Path(ar_bundle.shards), "s3://broken/shards")
    locations.upload_folder(Path(ar_bundle.output), "s3://broken/ar")
    job = train_job(
        "dual", shards="s3://broken/shards", init_from="s3://broken/ar", output="s3://broken/dual", shape=None,
        objective="dual", steps=60, zero_stage=3, validate_every=20, validation_rows=10, sample_every=30,
        sample_prompts=["def main(", "import"], sample_tokens=8, peak_flops="measure", system_metrics_every=0.5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("broken") / "job.yaml"
    with train_command(job, path) as driver:
        wait_until_some_steps_after_a_checkpoint(job, driver)
        driver.kill()
    while train_workers():
        time.sleep(0.5)
    assert not locations.exists(job.output)
    half = leave_half_a_checkpoint(job)
    with path.with_suffix(".log").open("w") as log, train_command(job, path, stderr=log) as driver:
        wait_until_some_steps_after_a_checkpoint(job, driver, logged=len(curve(job, "ar_loss")))
        os.kill(train_workers()[0].pid, signal.SIGKILL)
        assert driver.wait() == 0
    assert "workers failed; new ones go on from the newest checkpoint\n" in path.with_suffix(".log").read_text()
    assert not locations.exists(half)
    return job


def test_a_killed_command_and_a_killed_worker_resume_and_end_exactly_where_an_unbroken_run_ends(
    broken_run, dual_bundle
):
    logged, unbroken = curve(broken_run, "ar_loss"), dict(curve(dual_bundle, "ar_loss"))
    steps = [step for step, _ in logged]
    assert set(steps) == set(range(1, 61))
    assert len(steps) > 60  # some were trained, and logged, twice
    assert steps.count(1) == 1  # it went on and did not begin anew
    assert all(value == unbroken[step] for step, value in logged)
    ours, theirs = (load_bundle(j.output).model.state_dict() for j in (broken_run, dual_bundle))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert read_bundle_info(broken_run.output).lineage == read_bundle_info(dual_bundle.output).lineage


def test_the_run_shows_what_an_operator_needs(broken_run):
    from mlflow import MlflowClient

    assert [step for step, _ in curve(broken_run, "validation_loss")][-1] == 60
    ar, diffusion, both = (dict(curve(broken_run, f"validation_{name}"))[60] for name in
                           ("ar_loss", "diffusion_loss", "loss"))  # fmt: skip
    assert both == pytest.approx((ar + diffusion) / 2)
    speed, flops, mfu = (dict(curve(broken_run, name))[60] for name in ("tokens_per_second", "flops_per_second", "mfu"))
    assert speed > 0
    assert 0 < mfu < 1
    assert flops / mfu > 1e9  # the peak of a core of any machine that runs this
    assert dict(curve(broken_run, "memory_gib"))[60] > 0.2
    left = dict(curve(broken_run, "eta_seconds"))
    assert left[60] == 0 < left[59]
    run_id = locations.read_text(broken_run.output + ".run/mlflow_run_id")
    client = MlflowClient(broken_run.tracking_uri)
    assert "system/node_0/cpu_utilization_percentage" in client.get_run(run_id).data.metrics
    page = Path(client.download_artifacts(run_id, "samples/step-00000060.md")).read_text()
    assert "def main(" in page
    assert "tokens per forward" in page


def test_the_newest_checkpoints_stay_and_the_one_of_lowest_validation_loss(broken_run):
    whole = {c.cursor.step: c.cursor.validation_loss for c in whole_checkpoints(broken_run.checkpoints)}
    losses = dict(curve(broken_run, "validation_loss"))
    best = min(losses, key=losses.get)
    assert set(whole) == {50, 60, best}
    assert whole == {step: losses[step] for step in whole}


def test_a_run_that_diverges_is_one_line_exits_2_and_is_not_retried(train_job, tmp_path):
    from mlflow import MlflowClient

    job = train_job(
        "wild", objective="dual", precision="bf16", workers=1, learning_rate=1e20, min_learning_rate=0, warmup=0,
        steps=24, log_every=2, checkpoint_every=4, validate_every=4, max_skipped_updates=3,
    )  # fmt: skip
    with train_command(job, tmp_path / "job.yaml", stderr=subprocess.PIPE, text=True) as driver:
        printed = driver.communicate()[1]
    assert driver.returncode == 2
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"tidar: training of {job.output} diverged at train step 4: 3 steps in a row had no finite")
    assert not locations.exists(job.output)
    assert curve(job, "skipped_updates") == [(2, 1), (4, 3)]  # each step once
    run_id = locations.read_text(job.output + ".run/mlflow_run_id")
    assert MlflowClient(job.tracking_uri).get_run(run_id).info.status == "FAILED"


def test_missing_shards_are_named_before_a_worker_starts(train_job, tmp_path):
    from pipelines.training.train import train

    with pytest.raises(ShardError, match="nowhere"):
        train(train_job("x", shards=str(tmp_path / "nowhere")))
    assert not Path(train_job("x").output).exists()


def test_a_tampered_shard_is_named_before_a_worker_starts(train_job, shards, tmp_path):
    import shutil

    from pipelines.training.train import train

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = copy / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"train-00000\.parquet") as caught:
        train(train_job("tampered", shards=str(copy)))
    assert "\n" not in str(caught.value)
    assert not Path(train_job("tampered").output).exists()


def test_a_start_that_is_no_model_is_named(train_job, tmp_path):
    from pipelines.training.train import train

    with pytest.raises(ConfigError, match=r"no config\.json"):
        train(train_job("y", shape=None, init_from=str(tmp_path)))


def test_a_start_of_another_tokenizer_is_refused(train_job, tmp_path):
    from tiny import save_tiny_bundle

    from pipelines.training.train import train

    other = save_tiny_bundle(tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(train_job("w", shape=None, init_from=str(other)))


def test_a_start_with_a_flipped_byte_is_named(train_job, ar_bundle, tmp_path):
    import shutil

    from pipelines.training.train import train

    copy = tmp_path / "ar"
    shutil.copytree(ar_bundle.output, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        train(train_job("z", shape=None, init_from=str(copy)))
