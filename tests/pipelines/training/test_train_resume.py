"""A run that stops goes on as if it had not: same losses, for each ZeRO stage, on as many workers or others."""

import signal
from pathlib import Path

import pytest
import torch
from gloo import curve, exit_codes, logged, start_workers, train_on
from tiny import save_tiny_shards

from pipelines.jobs import TrainJob
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.shards import ShardReader
from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.training.losses import label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.row_order import rows_of_step
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
STEPS, STOP = 6, 3


class Runs:
    """Jobs of one folder."""

    def __init__(self, folder):
        self.folder, self.logs = folder, folder / "logs"
        self.shards = save_tiny_shards(folder / "shards")

    def job(self, name, **changes):
        values = {
            "shards": self.shards, "output": str(self.folder / name), "shape": "tiny", "block_len": 4, "link_rank": 5,
            "position_weights": "dpace", "dpace_after": 0.3, "first_weight": 0.1, "distillation": 0.5, "unlinked": 0.3,
            "consistency": 0.1, "steps": STEPS,
            "rows_per_step": 12, "rows_per_forward": 3, "learning_rate": 5e-3, "min_learning_rate": 5e-4,
            "clip_norm": 0.5, "precision": "fp32", "workers": 2, "checkpoint_every": STOP, "log_every": 1,
        }  # fmt: skip
        if "resume_from" in changes:
            del values["shape"]
        return TrainJob.model_validate(values | changes)

    def stopped(self, name):
        """State of this job after `STOP` steps."""
        return str(self.folder / f"{name}.run/checkpoints/step-{STOP:08d}")

    def losses(self, name):
        job = self.job(name)
        return [curve(self.logs, job, metric) for metric in ("ar_loss", "diffusion_loss", "grad_norm")]

    def weights(self, name):
        return load_bundle(self.folder / name).model.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two workers train with each stage and precision and go on from the middle; one and three workers do so too."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    two = []
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            name = f"{precision}-{stage}"
            two.append(runs.job(name, zero_stage=stage, precision=precision))
            two.append(runs.job(
                f"{name}-on", zero_stage=stage, precision=precision, resume_from=runs.stopped(name),
            ))  # fmt: skip
        two.append(runs.job(f"offload-{stage}", zero_stage=stage, offload_optimizer="cpu"))
        two.append(runs.job(
            f"watched-{stage}", zero_stage=stage, validate_every=2, validation_rows=10, sample_every=3,
            sample_prompts=["import", "def f("], sample_tokens=6, activation_checkpointing=True,
        ))  # fmt: skip
        two.append(runs.job(f"shared-{stage}", zero_stage=stage, sequence_parallel=2))
    killed = [runs.job(f"killed-{stage}", zero_stage=stage) for stage in STAGES]
    fifth_step = 4 * 2 + 2  # two forwards a step; its second
    groups = [start_workers(2, [job], runs.logs, dies_in_forward=fifth_step) for job in killed]
    assert all(-signal.SIGKILL in exit_codes(group) for group in groups)
    train_on(2, two + killed, runs.logs)
    train_on(1, [runs.job("alone", workers=1)], runs.logs)
    train_on(3, [
        runs.job(f"three-{stage}", workers=3, rows_per_forward=2, zero_stage=stage % 3 + 1,
                 resume_from=runs.stopped(f"fp32-{stage}"))
        for stage in STAGES
    ], runs.logs)  # fmt: skip
    return runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_exact_to_the_last_bit(runs, stage, precision):
    name = f"{precision}-{stage}"
    for unbroken, resumed in zip(runs.losses(name), runs.losses(f"{name}-on")):
        assert list(unbroken) == [1, 2, 3, 4, 5, 6]
        assert resumed == {step: unbroken[step] for step in (4, 5, 6)}
    ours = runs.weights(f"{name}-on")
    for weight, value in runs.weights(name).items():
        assert torch.equal(ours[weight], value), weight


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_worker_was_killed_in_mid_step_goes_on_exactly(runs, stage):
    unbroken = runs.losses(f"fp32-{stage}")[0]
    entries = [(step, metrics["ar_loss"]) for step, metrics in logged(runs.logs, runs.job(f"killed-{stage}"))]
    assert [step for step, _ in entries] == [1, 2, 3, 4, 4, 5, 6]  # the fifth broke off; the checkpoint was the third's
    assert all(loss == unbroken[step] for step, loss in entries)
    ours = runs.weights(f"killed-{stage}")
    for weight, value in runs.weights(f"fp32-{stage}").items():
        assert torch.equal(ours[weight], value), weight


@pytest.mark.parametrize("stage", STAGES)
def test_other_workers_at_another_stage_go_on_with_the_same_rows(runs, stage):
    for unbroken, resumed in zip(runs.losses(f"fp32-{stage}"), runs.losses(f"three-{stage}")):
        # sums in another order, whose rounding six steps amplify; a row left out changes the third digit
        assert resumed == pytest.approx({step: unbroken[step] for step in (4, 5, 6)}, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_equals_two_even_when_one_of_them_has_few_labels(runs, stage):
    for alone, two in zip(runs.losses("alone"), runs.losses(f"fp32-{stage}")):
        assert two == pytest.approx(alone, rel=1e-4)
    reader = ShardReader(runs.shards)
    objective = Objective(TidarModel(named_shape("tiny")), dual=True, block_len=4)
    shares = []
    for step in range(STEPS):
        rows = rows_of_step(step, rows_per_step=12, rows=len(reader), seed=0)
        packed = [reader.rows(half) for half in (rows[:6], rows[6:])]
        labels = [label_counts(objective.batch(half.input_ids_BS, half.document_ids_BS))[1] for half in packed]
        shares.append(max(labels) / min(labels))
    assert max(shares) > 2  # so a mean of the workers' means would be another number


@pytest.mark.parametrize("stage", STAGES)
def test_an_offloaded_optimizer_makes_the_same_updates(runs, stage):
    for plain, offloaded in zip(runs.losses(f"fp32-{stage}"), runs.losses(f"offload-{stage}")):
        assert offloaded == pytest.approx(plain, rel=1e-4)  # sums of gradients in another order


@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_validation_and_samples_disturb_no_step_exactly(runs, stage):
    assert runs.losses(f"watched-{stage}") == runs.losses(f"fp32-{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_workers_that_share_every_row_equal_one_that_has_it_whole(runs, stage):
    for alone, shared in zip(runs.losses("alone"), runs.losses(f"shared-{stage}")):
        assert shared == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_validation_is_the_mean_over_held_out_labels(runs, stage):
    job = runs.job(f"watched-{stage}")
    found = {name: curve(runs.logs, job, f"validation_{name}") for name in ("ar_loss", "diffusion_loss", "loss")}
    assert all(list(values) == [2, 3, 4, 6] for values in found.values())  # every second step, and every checkpoint
    bundle = load_bundle(runs.folder / f"watched-{stage}")
    reader = ShardReader(runs.shards, "held_out")
    packed = reader.rows(range(10))
    objective = Objective(bundle.model, dual=True, block_len=4)
    with torch.no_grad():
        sums = objective(objective.batch(packed.input_ids_BS, packed.document_ids_BS))
    ar, diffusion = (sums.ar_sum / sums.ar_count).item(), (sums.diffusion_sum / sums.diffusion_count).item()
    assert [values[6] for values in found.values()] == pytest.approx([ar, diffusion, (ar + diffusion) / 2], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_continuations_during_training_are_those_of_the_bundle(runs, stage):
    page = (runs.logs / f"watched-{stage}/samples/step-{STEPS:08d}.md").read_text()
    bundle = load_bundle(runs.folder / f"watched-{stage}")
    greedy = SamplingConfig(max_tokens=6, eos_ids=(bundle.tokenizer.eos_id,))
    for prompt in ("import", "def f("):
        ids = generate_autoregressive(bundle.model, tuple(bundle.tokenizer.encode(prompt)), greedy)
        assert f"```\n{prompt}{bundle.tokenizer.decode(ids)}\n```" in page
    assert (runs.logs / f"watched-{stage}/samples/step-00000003.md").exists()


def test_the_gathered_bundle_of_zero_3_is_that_of_zero_1(runs):
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = {}
    for stage in (1, 3):
        bundle = load_bundle(runs.folder / f"fp32-{stage}")
        objective = Objective(bundle.model, dual=True, block_len=4)
        batch = objective.batch(ids, torch.zeros_like(ids))
        with torch.no_grad():
            hidden = bundle.model(batch.token_BL, batch.layout.position, objective._attention(batch.layout))
            logits[stage] = bundle.model.head(hidden)
    # stage 3 computes logits of all tokens, stage 1 of labels alone; Adam amplifies the rounding over six steps
    torch.testing.assert_close(logits[3], logits[1], rtol=0, atol=3e-3)


def test_a_resumed_run_keeps_the_lineage_of_its_beginning(runs):
    begun, resumed = (read_bundle_info(runs.folder / name).lineage for name in ("fp32-1", "fp32-1-on"))
    assert resumed == begun
    assert begun["start"] == "random weights of shape tiny, seed 0"
    assert Path(runs.stopped("fp32-1")).is_dir()
