"""Training with torch alone: the same loss as the jobs', two phases, and what is reported of them."""

import itertools
import math

import pytest
import torch
from oracles import documents_row

from tidar_core.errors import ConfigError, DivergedError
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.packing import PackedRows
from tidar_core.training.recipe import Recipe
from tidar_core.training.row_order import rows_of_step
from tidar_core.training.schedule import Schedule
from tidar_core.training.trainer import Optimisation, Phase, Trainer
from tidar_core.transformer.model import TidarModel

STEADY = Schedule(peak=1e-2, minimum=1e-2, warmup=0.0)
ROWS = PackedRows(
    torch.arange(16, dtype=torch.int32).repeat(8, 4),
    torch.cat([documents_row(64), documents_row(40, 24)]).int().repeat(4, 1),
)


def fresh(model, dtype=torch.float32):
    own = TidarModel(model.config)
    own.init_weights(0)
    return own.to(dtype)


def phase(**changes):
    return Phase(**({"dual": False, "schedule": STEADY, "rows_per_step": 4, "rows_per_forward": 4} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dual_phase_after_the_ar_phase_lowers_both_losses(model, dtype):
    torch.manual_seed(0)
    trainer = Trainer(fresh(model, dtype), block_len=4)
    start = trainer.evaluate(ROWS, rows_per_forward=4)
    trainer.train(phase(steps=40), ROWS, lambda _: None)
    after_ar = trainer.evaluate(ROWS, rows_per_forward=4)
    trainer.train(phase(steps=40, dual=True), ROWS, lambda _: None)
    after_dual = trainer.evaluate(ROWS, rows_per_forward=4)
    assert start.ar_loss == pytest.approx(math.log(511), rel=0.02)
    assert after_ar.ar_loss < 1 < after_ar.diffusion_loss
    assert after_dual.ar_loss < 0.5
    assert after_dual.diffusion_loss < 0.5
    assert min(after_dual.draft_accuracy_K) > 0.8


@pytest.mark.parametrize("dual", [False, True])
def test_a_step_reports_the_loss_of_the_objective_and_applies_its_gradient(model, dual):
    own, plain = fresh(model), fresh(model)
    reports = []
    optimisation = Optimisation(clip_norm=1e9, weight_decay=0.0)
    Trainer(own, block_len=4, optimisation=optimisation).train(
        phase(steps=1, dual=dual, rows_per_forward=2, recipe=Recipe(alpha=0.5)), ROWS, reports.append
    )
    objective = Objective(plain, dual=dual, block_len=4)
    index = torch.tensor(rows_of_step(0, rows_per_step=4, rows=8, seed=0))
    batch = objective.batch(ROWS.input_ids_BS[index].long(), ROWS.document_ids_BS[index].long())
    sums = objective(batch)
    dual_mode_loss(sums, 0.5, *label_counts(batch)).backward()
    losses = reports[0].losses
    assert losses.ar_loss == pytest.approx((sums.ar_sum / sums.ar_count).item(), rel=1e-5)
    if dual:
        assert losses.diffusion_loss == pytest.approx((sums.diffusion_sum / sums.diffusion_count).item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    assert reports[0].grad_norm == pytest.approx(norm.item(), rel=1e-4)
    torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0).step()
    for (name, ours), theirs in zip(own.named_parameters(), plain.parameters()):
        # Adam's first update is the sign of the gradient: where that is rounding noise, either sign is right
        assert ((ours - theirs).abs() < 1e-4).float().mean() > 0.99, name


def test_updates_too_small_for_bf16_still_add_up(model):
    own = fresh(model, torch.bfloat16)
    trainer = Trainer(own, block_len=4, optimisation=Optimisation(weight_decay=0.0))
    before = own.layers[0].mlp.down.weight.detach().clone()
    tiny = Schedule(peak=1e-6, minimum=1e-6, warmup=0.0)
    trainer.train(phase(steps=30, schedule=tiny), ROWS, lambda _: None)
    masters = next(m for w, m in zip(trainer._masters.weights, trainer._masters.masters)
                   if w is own.layers[0].mlp.down.weight)  # fmt: skip
    moved = (masters.detach() - before.float()).abs()
    assert 1e-5 < moved.max() < 1e-4  # thirty steps of 1e-6; a weight of 0.02 rounds to 6e-5
    assert torch.equal(own.layers[0].mlp.down.weight, masters.to(torch.bfloat16))


def test_a_phase_of_seconds_ends_with_its_time_and_follows_the_share_of_it(model):
    reports = []
    schedule = Schedule(peak=1e-3, minimum=0.0, warmup=0.1)
    done = Trainer(fresh(model), block_len=4).train(
        phase(seconds=1.0, schedule=schedule, report_every=1), ROWS, reports.append
    )
    assert 0.5 < done.seconds < 6  # the last report comes up to a step before the limit that ends the phase
    assert done.steps == len(reports)
    assert done.tokens == done.steps * 4 * 64
    assert done.eta_seconds == 0
    assert reports[-1].learning_rate < max(report.learning_rate for report in reports)


def test_a_phase_has_either_steps_or_seconds():
    with pytest.raises(ConfigError, match="steps or seconds"):
        phase()
    with pytest.raises(ConfigError, match="multiple of rows_per_forward, 3"):
        phase(steps=1, rows_per_forward=3)


def test_warming_up_changes_nothing(model):
    own = fresh(model)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    Trainer(own, block_len=4).warm_up(phase(steps=1, dual=True), ROWS)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert all(p.grad is None for p in own.parameters())


def spoil_gradients(model, *backwards):
    """Make the first layer's gradient nan in backward passes of these ordinals."""
    count = itertools.count(1)

    def spoil(gradient):
        return gradient * math.nan if next(count) in backwards else gradient

    model.layers[0].mlp.down.weight.register_hook(spoil)


NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted(model, dtype, device):
    own, seen = fresh(model, dtype).to(device), []
    spoil_gradients(own, 2, 3)  # of two forwards a step: the first or the second alone spoils it
    trainer = Trainer(own, block_len=4)

    def look(progress):
        weights = [p.detach().clone() for p in own.parameters()]
        updates = {int(state["step"]) for state in trainer._masters.optimizer.state.values()}
        seen.append((progress.skipped_updates, math.isfinite(progress.grad_norm), updates, weights))

    trainer.train(phase(steps=4, rows_per_forward=2, report_every=1), ROWS, look)
    assert [entry[:3] for entry in seen[2:]] == [(2, True, {1}), (2, True, {2})]
    assert [entry[:2] for entry in seen[:2]] == [(1, False), (2, False)]
    for before, after, changed in zip(seen[0][3], seen[1][3], seen[3][3]):
        assert torch.equal(before, after)
        assert not torch.equal(after, changed)
    assert all(torch.isfinite(p).all() for p in own.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_phase_that_diverges_ends_with_its_limit_and_finite_weights(model, dtype):
    own = fresh(model, dtype)
    wild = Schedule(peak=1e20, minimum=1e20, warmup=0.0)
    with pytest.raises(
        DivergedError, match=r"5 steps in a row had no finite loss or gradient .*learning rate below 1e"
    ):
        Trainer(own, block_len=4).train(
            phase(steps=99, schedule=wild, report_every=6, max_skipped_updates=5), ROWS, lambda _: None
        )
    assert all(torch.isfinite(p).all() for p in own.parameters())
