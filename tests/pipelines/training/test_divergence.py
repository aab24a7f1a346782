"""Losses and gradients that are not finite: skipped, counted, and the end of a run before it loses what was healthy."""

import math

import pytest
import torch
from gloo import curve, end_of, logged, train_on
from tiny import save_tiny_shards

from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import whole_checkpoints
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

pytestmark = pytest.mark.slow

KINDS = [(1, "bf16"), (2, "fp32"), (3, "bf16")]
"""ZeRO stages and precisions: each is another optimizer of DeepSpeed's."""
OFFLOADED = [(1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]
FORWARDS = 2
"""Forwards of a worker in a train step."""
LIMIT = 3


class Runs:
    """Jobs of one folder, and what the last of two workers spoils in each."""

    def __init__(self, folder):
        self.folder, self.logs, self.spoiled = folder, folder / "logs", {}
        self.shards = save_tiny_shards(folder / "shards")

    def job(self, name, spoils=None, **changes):
        """spoils  what is made nan, and in which train steps, the first and the last"""
        values = {
            "shards": self.shards, "output": str(self.folder / name), "shape": "tiny", "block_len": 4, "steps": 10,
            "rows_per_step": 8, "rows_per_forward": 2, "learning_rate": 5e-3, "min_learning_rate": 5e-4, "workers": 2,
            "checkpoint_every": 2, "log_every": 1, "keep_checkpoints": 1, "max_skipped_updates": LIMIT,
        }  # fmt: skip
        if "resume_from" in changes:
            del values["shape"]
        if spoils:
            kind, first, last = spoils
            forwards = FORWARDS * changes.get("sequence_parallel", 1)
            self.spoiled[name] = (kind, forwards * (first - 1) + 1, forwards * last)
        return TrainJob.model_validate(values | changes)

    def kept(self, name):
        return {one.cursor.step: one.cursor for one in whole_checkpoints(f"{self.folder}/{name}.run/checkpoints")}

    def weights(self, name):
        return load_bundle(self.folder / name).model.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("diverge"))
    jobs, mended = [], []
    for stage, precision in KINDS:
        how, name = {"zero_stage": stage, "precision": precision}, f"{precision}-{stage}"
        jobs += [
            runs.job(f"lost-{name}", ("loss", 6, 99), **how),
            runs.job(f"blip-{name}", ("gradient", 4, 5), **how),
            runs.job(f"first-{name}", ("gradient", 1, 1), steps=1, **how),
            runs.job(f"later-{name}", ("gradient", 1, 1), steps=4, **how),
            runs.job(f"whole-{name}", **how),
        ]
        mended += [
            runs.job(f"lost-{name}", **how),
            runs.job(f"resumed-{name}", steps=4, resume_from=f"{runs.folder}/first-{name}.run", **how),
        ]
    jobs.append(runs.job("shared", ("loss", 6, 99), sequence_parallel=2))
    jobs.append(runs.job("deaf", ("gradient", 6, 99)))
    jobs.append(runs.job("late", ("loss", 10, 10)))
    jobs.append(runs.job("wild", learning_rate=1e20, validate_every=4))
    jobs.append(runs.job("watched", ("loss", 7, 99), checkpoint_every=1, validate_every=1))
    jobs += [
        runs.job(f"offload-{precision}-{stage}", ("gradient", 4, 5), zero_stage=stage, precision=precision,
                 offload_optimizer="cpu") for stage, precision in OFFLOADED
    ]  # fmt: skip
    train_on(2, jobs, runs.logs, runs.spoiled)
    runs.ends = {job.output.rsplit("/", 1)[1]: end_of(runs.logs, job, 2) for job in jobs}
    runs.skipped, runs.norms = (
        {job.output.rsplit("/", 1)[1]: curve(runs.logs, job, metric) for job in jobs}
        for metric in ("skipped_updates", "grad_norm")
    )
    runs.stopped = {job.output.rsplit("/", 1)[1]: set(runs.kept(job.output.rsplit("/", 1)[1])) for job in jobs}
    train_on(2, mended, runs.logs)
    return runs


def jobs_named(name, kinds=KINDS):
    return [f"{name}-{precision}-{stage}" for stage, precision in kinds]


@pytest.mark.parametrize("name", [*jobs_named("lost"), "deaf", "shared"])
def test_a_run_stops_after_so_many_skipped_updates_and_keeps_its_healthy_checkpoints(runs, name):
    first, second = runs.ends[name]
    assert first == second
    assert "\n" not in first
    assert f"{runs.folder}/{name} diverged at train step 8: 3 steps in a row had no finite loss or gradient" in first
    assert "max_skipped_updates is 3" in first
    assert f"{name}.run/checkpoints/step-00000004 is the newest healthy checkpoint" in first
    assert "learning_rate below 0.005" in first
    assert runs.stopped[name] == {2, 4}
    assert runs.skipped[name] == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 2, 8: 3}
    assert [step for step, norm in runs.norms[name].items() if math.isnan(norm)] == [6, 7, 8]


@pytest.mark.parametrize("name", jobs_named("lost"))
def test_a_run_that_stopped_goes_on_exactly_once_its_cause_is_gone(runs, name):
    ours, theirs = runs.weights(name), runs.weights(name.replace("lost", "whole"))
    assert all(torch.equal(ours[weight], value) for weight, value in theirs.items())


@pytest.mark.parametrize("name", [*jobs_named("blip"), *jobs_named("offload", kinds=OFFLOADED)])
def test_fewer_skipped_updates_are_counted_and_the_run_goes_on(runs, name):
    assert runs.ends[name] == []
    assert list(runs.skipped[name].values()) == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert {step: cursor.updates for step, cursor in runs.kept(name).items()} == {10: 8}
    assert load_bundle(runs.folder / name).info.objective == "dual"


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_a_first_checkpoint_without_any_update_is_written_and_gone_on_from_exactly(runs, stage, precision):
    name = f"{precision}-{stage}"
    assert runs.ends[f"first-{name}"] == []
    assert runs.kept(f"first-{name}")[1].updates == 0
    fresh = TidarModel(named_shape("tiny", vocab_len=300))
    fresh.init_weights(0)
    kept = runs.weights(f"first-{name}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert all(torch.equal(kept[weight], value.to(dtype).float()) for weight, value in fresh.state_dict().items())
    ours, theirs = runs.weights(f"resumed-{name}"), runs.weights(f"later-{name}")
    assert all(torch.equal(ours[weight], value) for weight, value in theirs.items())
    assert curve(runs.logs, runs.job(f"resumed-{name}"), "skipped_updates") == {2: 1, 3: 1, 4: 1}


def test_a_learning_rate_that_blows_the_weights_up_leaves_no_checkpoint_and_no_bundle(runs):
    first, second = runs.ends["wild"]
    assert first == second
    assert "diverged at train step 4: 3 steps in a row" in first
    assert "there is no healthy checkpoint" in first
    assert "learning_rate below 1e+20" in first
    assert not runs.stopped["wild"]
    assert not (runs.folder / "wild").exists()


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_its_checkpoint_is_written(runs):
    # a validation has three forwards: the 13th, the first that is spoiled, is of the third validation
    assert "diverged at train step 3: the validation loss is nan" in runs.ends["watched"][0]
    assert runs.stopped["watched"] == {1, 2}


def test_a_run_whose_last_loss_is_not_finite_leaves_no_bundle(runs):
    assert "diverged at train step 10: 1 steps in a row" in runs.ends["late"][0]
    assert not (runs.folder / "late").exists()
    assert runs.stopped["late"] == {6, 8}
    assert logged(runs.logs, runs.job("late"))[-1][0] == 10
