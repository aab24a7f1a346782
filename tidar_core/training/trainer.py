"""Trainer on one device, with torch alone.

Weights keep their dtype. If it is bf16, AdamW updates fp32 copies of them (masters). The masters gather the gradients,
and are rounded back to the weights after every update. So the trained network is the served network, bit for bit, while
small updates add up. DeepSpeed's bf16 mode does the same in the jobs. A phase is limited by train steps or by seconds;
the rows of its steps follow from (seed, step), as everywhere.

Shape letters: B rows, S tokens of a row, K block length.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidar_core.errors import ConfigError, DivergedError
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.flops import train_flops, visible_pairs
from tidar_core.training.losses import LossMeans, LossSums, LossTotals, dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.packing import PackedRows
from tidar_core.training.recipe import Recipe
from tidar_core.training.row_order import rows_of_step, seeds_of_step
from tidar_core.training.schedule import Schedule
from tidar_core.transformer.attention import SplitAttention
from tidar_core.transformer.layout import TokenLayout
from tidar_core.transformer.model import TidarModel

__all__ = ["Optimisation", "Phase", "Progress", "Trainer"]

STEPS_IN_FLIGHT = 2
"""Train steps that the device may be behind: it never idles, and measured times are never far off."""
PAIRS_SAMPLE = 512
"""Rows over which pairs of tokens are counted for MFU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimisation:
    """Settings of AdamW; the defaults are usual for training from scratch."""

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Weight decay of matrices; other parameters have none."""
    clip_norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training under one objective and one schedule."""

    dual: bool
    schedule: Schedule
    rows_per_step: int
    rows_per_forward: int
    """Rows that memory holds at once; gradients add up over the forwards of a train step."""
    steps: int | None = None
    seconds: float | None = None
    """Limit in seconds, if there are no steps; the schedule then follows the share of them that has passed."""
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    max_skipped_updates: int = 10
    """Train steps in a row without a finite loss and gradient, after which the phase ends; all are skipped."""
    report_every: int = 10

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError("a phase has steps or seconds; give one of the two")
        if self.rows_per_step % self.rows_per_forward:
            raise ConfigError(
                f"rows_per_step is {self.rows_per_step}; it must be a multiple of rows_per_forward, "
                f"{self.rows_per_forward}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Report of training: losses and speeds are means since the last report."""

    steps: int
    """Completed train steps of the phase."""
    tokens: int
    """Clean tokens of the phase that were trained on."""
    seconds: float
    eta_seconds: float
    learning_rate: float
    grad_norm: float
    """Gradient norm of the last train step, before clipping."""
    skipped_updates: int
    """Train steps of the phase whose update was skipped, because their gradient was not finite."""
    tokens_per_second: float
    """Clean tokens per second; the mask half of doubled rows is not counted."""
    flops_per_second: float
    """Needed operations per second (`tidar_core.training.flops`); divided by the device's peak it is MFU."""
    losses: LossMeans


class Trainer:
    """Trains a model over any number of phases; holds its optimizer state and compiled forms."""

    def __init__(
        self,
        model: TidarModel,
        *,
        block_len: int,
        optimisation: Optimisation | None = None,
        compiled: bool = False,
        attention: Callable[[TokenLayout], SplitAttention] | None = None,
    ) -> None:
        """compiled   compile layers and loss for each shape at its first forward
        attention  makes the attention for a batch's layout; `None` chooses by device
        """
        self.model, self.block_len = model, block_len
        self.device = model.embedding.weight.device
        self._attention, self._compiled = attention, compiled
        self._objectives: dict[tuple[bool, Recipe], Objective] = {}
        self._optimisation = optimisation or Optimisation()
        self._masters = _Masters(model, self._optimisation)

    def train(self, phase: Phase, rows: PackedRows, report: Callable[[Progress], None]) -> Progress:
        """Train through `phase` on `rows`, and return the last report.

        An update is skipped if the gradient is not finite, as in DeepSpeed. Raises DivergedError at a report, after
        `max_skipped_updates` skipped updates in a row.

        rows    on any device; batches are moved
        report  called with each report, every `report_every` steps and at the end
        """
        objective = self._objective(phase.dual, phase.recipe)
        window = _Window(self, phase, rows)
        in_flight: deque[torch.cuda.Event] = deque()
        began, step, last = time.perf_counter(), 0, None
        while (share := _share(phase, step, time.perf_counter() - began)) < 1:
            rate = phase.schedule.at_share(share) if phase.steps is None else phase.schedule.at_step(step, phase.steps)
            batches = list(self._batches(objective, rows, step, phase, share))
            for sums in self._gradients(objective, batches):
                window.add(sums)
            norm = self._masters.update(rate)
            window.count_skipped(norm)
            step += 1
            self._limit_in_flight(in_flight)
            if step % phase.report_every == 0 or step == phase.steps:
                last = window.close(step, rate, norm, began)
                report(last)
        assert last is not None or step, "the phase was over before its first step"
        if last is None or last.steps < step:
            last = window.close(step, rate, norm, began)
            report(last)
        return last

    def warm_up(self, phase: Phase, rows: PackedRows) -> None:
        """Run one forward and backward without an update, which compiles everything that the phase needs."""
        objective = self._objective(phase.dual, phase.recipe)
        for _ in self._gradients(objective, [next(self._batches(objective, rows, 0, phase))]):
            pass
        self._masters.forget()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def evaluate(self, rows: PackedRows, *, rows_per_forward: int) -> LossMeans:
        """Mean losses over all labels of `rows` in both modes, by the paper's recipe.

        Gradients stay enabled, so that the compiled form of training is used; no gradient is computed.
        """
        objective = self._objective(True, Recipe())
        totals = LossTotals(self.block_len, self.device)
        for first in range(0, len(rows.input_ids_BS), rows_per_forward):
            totals.add(objective(self._batch(objective, rows, slice(first, first + rows_per_forward))))
        return totals.means()

    def _objective(self, dual: bool, recipe: Recipe) -> Objective:
        if (dual, recipe) not in self._objectives:
            objective = Objective(
                self.model, dual=dual, block_len=self.block_len, recipe=recipe, attention=self._attention,
                ragged=self.device.type == "cpu" and not self._compiled,
            ).train()  # fmt: skip
            if self._compiled:
                objective.compile_parts()
            self._objectives[dual, recipe] = objective
        return self._objectives[dual, recipe]

    def _gradients(self, objective: Objective, batches: list[TrainBatch]) -> Iterator[LossSums]:
        """Add the gradients of one train step to the masters; both losses are means over all its labels."""
        counts = torch.stack([torch.stack(label_counts(batch)) for batch in batches]).sum(0)
        for batch in batches:
            sums = objective(batch)
            dual_mode_loss(sums, objective.recipe.alpha, *counts).backward()
            self._masters.gather()
            yield sums

    def _batches(
        self, objective: Objective, rows: PackedRows, step: int, phase: Phase, share: float = 0.0
    ) -> Iterator[TrainBatch]:
        count, at = len(rows.input_ids_BS), {"rows_per_step": phase.rows_per_step, "seed": phase.seed}
        indices = torch.tensor(rows_of_step(step, rows=count, **at)).to(rows.input_ids_BS.device)
        seeds = seeds_of_step(step, **at)
        for first in range(0, phase.rows_per_step, phase.rows_per_forward):
            some = slice(first, first + phase.rows_per_forward)
            yield self._batch(objective, rows, indices[some], seeds[some], share)

    def _batch(
        self,
        objective: Objective,
        rows: PackedRows,
        index: Tensor | slice,
        seed_B: list[int] | None = None,
        share: float = 0.0,
    ) -> TrainBatch:
        tokens, documents = (self._moved(x[index]).long() for x in (rows.input_ids_BS, rows.document_ids_BS))
        trained = None if rows.trained_BS is None else self._moved(rows.trained_BS[index])
        return objective.batch(tokens, documents, trained, seed_B=seed_B, share=share)

    def _moved(self, x_BS: Tensor) -> Tensor:
        return x_BS.to(self.device, non_blocking=True)

    def _limit_in_flight(self, in_flight: deque[torch.cuda.Event]) -> None:
        if self.device.type == "cuda":
            in_flight.append(torch.cuda.current_stream(self.device).record_event())
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().synchronize()


class _Masters:
    """AdamW over fp32 copies of the weights, or over the weights themselves if they are fp32."""

    def __init__(self, model: TidarModel, optimisation: Optimisation) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.copied = self.weights[0].dtype != torch.float32
        self.masters = [p.detach().float().requires_grad_() for p in self.weights] if self.copied else self.weights
        self.clip_norm = optimisation.clip_norm
        groups = [
            {"params": [p for p in self.masters if p.dim() > 1], "weight_decay": optimisation.weight_decay},
            {"params": [p for p in self.masters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        fused = self.weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimisation.betas, fused=fused)

    @torch.no_grad()
    def gather(self) -> None:
        """Add the gradients of one backward pass to the masters', in fp32."""
        if not self.copied:
            return
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    master.grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def update(self, rate: float) -> Tensor:
        """Update with the gathered gradients, unless they are not finite; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        finite = norm.isfinite()
        if norm.is_cuda:  # a fused AdamW reads this flag on the device, so nothing waits for it
            self.optimizer.found_inf = (~finite).float()  # pyrefly: ignore[missing-attribute]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.copied:
            for weight, master in zip(self.weights, self.masters):
                weight.copy_(master)
        self.forget()
        return norm

    def forget(self) -> None:
        """Drop the gathered gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class _Window:
    """Sums since the last report, and the counts of skipped updates."""

    def __init__(self, trainer: Trainer, phase: Phase, rows: PackedRows) -> None:
        self.phase, self.block_len, self.device = phase, trainer.block_len, trainer.device
        self.row_len = rows.input_ids_BS.shape[1]
        sample = rows.document_ids_BS[:PAIRS_SAMPLE].long()
        share = phase.recipe.block_share * phase.recipe.visits if phase.dual else 0.0
        clean_pairs, all_pairs = visible_pairs(sample), visible_pairs(sample, trainer.block_len)
        pairs = round((clean_pairs + share * (all_pairs - clean_pairs)) / len(sample))
        tokens = round(self.row_len * (1 + share))
        self.flops_of_step = phase.rows_per_step * train_flops(
            trainer.model.config, tokens, pairs, tokens - self.row_len
        )
        self.steps = 0
        self.skipped, self.in_a_row, self.longest = (torch.zeros((), device=self.device) for _ in range(3))
        self.loss = torch.zeros((), device=self.device)
        self._open()

    def _open(self) -> None:
        self.totals = LossTotals(self.block_len, self.device)
        self.began = time.perf_counter()

    def add(self, sums: LossSums) -> None:
        self.totals.add(sums)
        self.loss = self.loss + sums.ar_sum.detach() + sums.diffusion_sum.detach()

    def count_skipped(self, norm: Tensor) -> None:
        """Count a train step whose gradient has this norm. Never waits for the device."""
        self.skipped = self.skipped + ~norm.isfinite()
        self.in_a_row = (self.in_a_row + 1) * ~(norm.isfinite() & self.loss.isfinite())
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self.loss = torch.zeros_like(self.loss)

    def close(self, steps: int, rate: float, norm: Tensor, phase_began: float) -> Progress:
        """Report of the window; begins the next window. Waits for the device. Raises DivergedError."""
        losses = self.totals.means()
        if self.longest >= self.phase.max_skipped_updates:
            raise DivergedError(
                f"training diverged before train step {steps}: {int(self.longest)} steps in a row had no finite loss "
                f"or gradient (max_skipped_updates is {self.phase.max_skipped_updates}); train again with a learning "
                f"rate below {self.phase.schedule.peak:g}"
            )
        now = time.perf_counter()
        per_second = (steps - self.steps) / (now - self.began)
        seconds = now - phase_began
        share = min(1.0, _share(self.phase, steps, seconds))
        self.steps = steps
        self._open()
        tokens_of_step = self.phase.rows_per_step * self.row_len
        return Progress(
            steps=steps,
            tokens=steps * tokens_of_step,
            seconds=seconds,
            eta_seconds=seconds * (1 - share) / share,
            learning_rate=rate,
            grad_norm=float(norm),
            skipped_updates=int(self.skipped),
            tokens_per_second=per_second * tokens_of_step,
            flops_per_second=per_second * self.flops_of_step,
            losses=losses,
        )


def _share(phase: Phase, step: int, seconds: float) -> float:
    """Used share of the phase's budget; 1 or more if it is exhausted."""
    if phase.steps is not None:
        return step / phase.steps
    assert phase.seconds is not None
    return seconds / phase.seconds
