"""Which mode, with which rows, brings the most tokens per second right now?

Cost comes from a measured latency table, gain from how often drafts stood so far. A draft's chance depends on which
mask of its block it came from, so a plan is a walk over how late in a block the pending drafts began; its long-run
tokens per forward follow from the walk's stationary law. Autoregression is always among the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from tidar_core.decoder import Decoder
from tidar_core.latency import LatencyTable, decoding_latency
from tidar_core.modes import FixedMode, Planner, StepPlan
from tidar_core.request import DecodeStep
from tidar_core.step import blocks_after
from tidar_core.ways import Way, few_ways, many_ways

__all__ = [
    "AUTO",
    "Acceptance",
    "AutoPlanner",
    "Choice",
    "expected_tokens",
    "measured_planner",
    "planner_of",
]

AUTO = "auto"
"""The mode that is all others, by turns."""

FORGET = 0.998
"""What an observation still weighs after the next verification of its mask."""
PRIOR = (1.0, 2.0)
"""Drafts kept and tried before any was seen, for each mask."""
HYSTERESIS = 1.03
"""A new choice must promise this many times the tokens per second of the present one."""
FIRST_REVIEW, LONGEST_REVIEW = 8, 256
"""Decode steps before the choice is first reviewed, and between reviews later; the gap doubles."""
PROBE_EVERY = 256
"""Autoregressive steps after which one block is drafted and verified, to see whether drafting would pay by now."""
WALK_STEPS = 24
"""Steps of the walk before its tokens are averaged, and over which they are: a multiple of most periods it can have."""


class Acceptance:
    """How often the i-th mask of a block drafted a token that stood, given that those before it did."""

    def __init__(self, block_len: int) -> None:
        self.block_len = block_len
        self.kept = [PRIOR[0]] * block_len
        self.tried = [PRIOR[1]] * block_len

    def observe(self, step: DecodeStep) -> None:
        """Take in one verification."""
        for draft in range(1, min(step.pending, step.verified)):
            if draft > step.accepted:
                return
            mask = step.late + draft
            stood = draft < step.accepted
            self.kept[mask] = FORGET * self.kept[mask] + stood
            self.tried[mask] = FORGET * self.tried[mask] + 1.0

    @property
    def chance(self) -> list[float]:
        """For masks 0..K-1; entry 0 is not used: the first token of a block is final."""
        return [kept / tried for kept, tried in zip(self.kept, self.tried)]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to decode, and what it promises."""

    mode: str
    cycle: tuple[StepPlan, ...]
    """Plans taken in turns; a two-pass round has two."""
    tokens_per_second: float
    """Expected, over all sequences of the batch."""


def planner_of(mode: str, decoder: Decoder, table: LatencyTable | None = None) -> Planner:
    """The planner of a mode for a decoder; `auto` needs the latency table of its device.

    Where steps are captured, few ways are weighed, those that the table was made of: they are captured already.
    """
    block_len = decoder.draft.block_len
    if mode != AUTO:
        return FixedMode(mode, block_len)
    assert table is not None, "auto needs a latency table"
    return AutoPlanner(table, block_len, few_ways(block_len) if decoder.captures else None)


def measured_planner(mode: str, decoder: Decoder, context_len: int | None = None) -> Planner:
    """The planner of a mode for a decoder; `auto` times forwards on its device first, up to `context_len`."""
    table = decoding_latency(decoder, context_len=context_len) if mode == AUTO else None
    return planner_of(mode, decoder, table)


def expected_tokens(plans: Sequence[StepPlan], chance: Sequence[float]) -> list[float]:
    """Long-run tokens per forward of one sequence that repeats each of `plans`; group 1 must be among their groups.

    The walk's state is the mask that predicted the place of the pending d_1: 0 for a whole block, K for none.
    """
    K = len(chance)
    moves, gains = [], []
    laws: dict[tuple[int, int], Tensor] = {}
    for plan in plans:
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        shape = (plan.clean_len, plan.masks(K))
        if shape not in laws:
            laws[shape] = torch.tensor([_lengths(*shape, late, chance) for late in range(K + 1)], dtype=torch.double)
        after = [min(K, block.late) for block in blocks_after(plan, K)[1:]]
        law = laws[shape]
        moves.append(torch.zeros(K + 1, K + 1, dtype=torch.double).index_add_(1, torch.tensor(after), law))
        gains.append(law @ torch.arange(1.0, plan.clean_len + 1, dtype=torch.double))
    move, gain = torch.stack(moves), torch.stack(gains)
    state = torch.zeros(len(plans), 1, K + 1, dtype=torch.double)
    state[..., 0] = 1.0
    tokens = torch.zeros(len(plans), dtype=torch.double)
    for step in range(2 * WALK_STEPS):
        if step >= WALK_STEPS:
            tokens += (state[:, 0] * gain).sum(-1)
        state = state @ move
    return (tokens / WALK_STEPS).tolist()


class AutoPlanner:
    """Picks the choice that promises most; reviews it as acceptance is learned, keeps to it unless clearly beaten."""

    def __init__(self, table: LatencyTable, block_len: int, ways: Sequence[Way] | None = None) -> None:
        """ways  that are weighed, autoregression first; many by default"""
        self.table, self.block_len = table, block_len
        self.ways = ways or many_ways(block_len)
        self.acceptance = Acceptance(block_len)
        self.choice = Choice("single-pass", (StepPlan(block_len, (1,), block_len),), 0.0)
        self.autoregressive_tokens_per_second = 0.0
        self._batch = self._steps = self._since_drafts = 0
        self._review_at, self._gap = 0, FIRST_REVIEW

    @property
    def drafts_at_prefill(self) -> bool:
        """In single-pass mode only; two-pass rounds keep one rhythm for the whole batch."""
        return self.choice.mode == "single-pass"

    def next_plan(self, pending: tuple[int, ...], context: int) -> StepPlan:
        """The choice's plan; where nothing is pending to be verified, drafts are made first."""
        if len(pending) != self._batch or self._steps >= self._review_at:
            self._review(len(pending), context)
        self._steps += 1
        if self.choice.mode == "autoregressive":
            return self._probe(pending)
        if max(pending) > 1:
            return self.choice.cycle[-1]
        return replace(self.choice.cycle[0], clean_len=1, groups=(1,))

    def observe(self, steps: Sequence[DecodeStep]) -> None:
        """Learn from the decode step that `next_plan` was asked for."""
        for step in steps:
            self.acceptance.observe(step)

    def facts(self) -> dict[str, Any]:
        """What it holds to, what that promises over autoregression, and what it has learned; for reports."""
        return {
            "mode": self.choice.mode,
            "plans": [
                {"verified": plan.clean_len, "groups": list(plan.groups), "masks": plan.masks(self.block_len)}
                for plan in self.choice.cycle
            ],
            "expected_over_ar": self.expected_over_ar,
            "chance_by_mask": self.acceptance.chance,
        }

    @property
    def expected_over_ar(self) -> float:
        """Tokens per second that the choice promises over those of the autoregressive mode; 1 before any review."""
        if not self.autoregressive_tokens_per_second:
            return 1.0
        return self.choice.tokens_per_second / self.autoregressive_tokens_per_second

    def weigh(self, batch: int, context: int) -> list[Choice]:
        """All candidates with what they promise for this batch."""
        chance = self.acceptance.chance
        walks = [way.cycle[0] for way in self.ways if way.mode == "single-pass"]
        walked = dict(zip(walks, expected_tokens(walks, chance))) if walks else {}
        choices = []
        for way in self.ways:
            mode, cycle = way.mode, way.cycle
            if mode == "two-pass":
                lengths = _lengths(cycle[1].clean_len, cycle[0].width, 0, chance)
                tokens = 1.0 + sum(n * p for n, p in enumerate(lengths, 1))
            else:
                tokens = walked.get(cycle[0], 1.0)
            seconds = sum(self.table.seconds(plan.rows(self.block_len), batch, context) for plan in cycle)
            choices.append(Choice(mode, cycle, batch * tokens / seconds))
        return choices

    def _review(self, batch: int, context: int) -> None:
        if batch != self._batch:
            self._gap = FIRST_REVIEW
        self._batch, self._review_at = batch, self._steps + self._gap
        self._gap = min(2 * self._gap, LONGEST_REVIEW)
        weighed = self.weigh(batch, context)
        self.autoregressive_tokens_per_second = weighed[0].tokens_per_second
        best = max(weighed, key=lambda choice: choice.tokens_per_second)
        present = next((c for c in weighed if c.cycle == self.choice.cycle), weighed[0])
        keeps = best.tokens_per_second < HYSTERESIS * present.tokens_per_second
        self.choice = present if keeps else best

    def _probe(self, pending: tuple[int, ...]) -> StepPlan:
        """One token a step; now and then one block is drafted, and then verified."""
        if max(pending) > 1:
            self._since_drafts = 0
            return StepPlan(self.block_len)
        self._since_drafts += 1
        if self._since_drafts < PROBE_EVERY or self.block_len == 1:
            return StepPlan(1)
        return StepPlan(1, (1,), self.block_len)


def _lengths(clean_len: int, width: int, late: int, chance: Sequence[float]) -> list[float]:
    """Law of the accepted length 1..clean_len, where mask `late` of a block of `width` predicted d_1's place."""
    drafts = max(0, min(clean_len, width - late) - 1)
    survival = list(accumulate(chance[late + 1 : late + 1 + drafts], mul, initial=1.0))
    law = [a - b for a, b in zip(survival, [*survival[1:], 0.0])]
    return law + [0.0] * (clean_len - len(law))
