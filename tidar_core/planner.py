"""Which mode, with which rows, brings the most tokens per second right now?

Cost comes from a measured latency table, gain from how often drafts stood so far. A draft's chance depends on which
mask of its block it came from, so a plan is a walk over how late in a block the pending drafts began; its long-run
tokens per forward follow from the walk's stationary law. Autoregression is always among the candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from tidar_core.decoder import Decoder
from tidar_core.latency import LatencyTable, decoding_latency
from tidar_core.modes import FixedMode, Planner, StepPlan
from tidar_core.request import DecodeStep

__all__ = [
    "AUTO",
    "Acceptance",
    "AutoPlanner",
    "Choice",
    "candidates",
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
        late = self.block_len - step.pending
        for draft in range(1, min(step.pending, step.verified)):
            if draft > step.accepted:
                return
            mask = late + draft
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


def planner_of(mode: str, block_len: int, table: LatencyTable | None = None) -> Planner:
    """The planner of a mode; `auto` needs the device's latency table."""
    if mode != AUTO:
        return FixedMode(mode, block_len)
    assert table is not None, "auto needs a latency table"
    return AutoPlanner(table, block_len)


def measured_planner(mode: str, decoder: Decoder, context_len: int | None = None) -> Planner:
    """The planner of a mode for a decoder; `auto` times forwards on its device first, up to `context_len`."""
    table = decoding_latency(decoder, context_len=context_len) if mode == AUTO else None
    return planner_of(mode, decoder.draft.block_len, table)


def expected_tokens(plan: StepPlan, chance: Sequence[float]) -> float:
    """Long-run tokens per forward of one sequence that repeats `plan`; group 1 must be among its groups.

    The walk's state is the mask that the pending d_1 came from: 0 for a whole block, K for none.
    """
    assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
    K = len(chance)
    law = [1.0] + [0.0] * K
    tokens = 0.0
    for step in range(2 * WALK_STEPS):
        after = [0.0] * (K + 1)
        for late, weight in enumerate(law):
            if weight < 1e-9:
                continue
            for n, probability in enumerate(_lengths(plan.clean_len, late, chance), 1):
                below = [group for group in plan.groups if group <= n]
                after[min(K, n - below[-1]) if below else K] += weight * probability
                tokens += weight * probability * n * (step >= WALK_STEPS)
        law = after
    return tokens / WALK_STEPS


def candidates(block_len: int) -> Iterator[tuple[str, tuple[StepPlan, ...]]]:
    """Every way to decode that is weighed: names and cycles."""
    yield "autoregressive", (StepPlan(1),)
    depths = sorted({2, 3, 4, 6, 8, 12, 16, block_len} & set(range(2, block_len + 1)))
    for clean_len in depths:
        yield "two-pass", (StepPlan(1, (1,)), StepPlan(clean_len))
        for groups in sorted({m for m in (1, 2, 3, 4, 6, 8, 12, 16) if m < clean_len} | {clean_len}):
            first = tuple(range(1, groups + 1))
            yield "single-pass", (StepPlan(clean_len, first),)
            if groups < clean_len - 1:
                yield "single-pass", (StepPlan(clean_len, (*first, clean_len)),)


class AutoPlanner:
    """Picks the choice that promises most; reviews it as acceptance is learned, keeps to it unless clearly beaten."""

    def __init__(self, table: LatencyTable, block_len: int) -> None:
        self.table, self.block_len = table, block_len
        self.acceptance = Acceptance(block_len)
        self.choice = Choice("single-pass", (StepPlan(block_len, (1,)),), 0.0)
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
        return StepPlan(1, (1,))

    def observe(self, steps: Sequence[DecodeStep]) -> None:
        """Learn from the decode step that `next_plan` was asked for."""
        for step in steps:
            self.acceptance.observe(step)

    def facts(self) -> dict[str, Any]:
        """What it holds to, what that promises over autoregression, and what it has learned; for reports."""
        return {
            "mode": self.choice.mode,
            "plans": [{"verified": plan.clean_len, "groups": list(plan.groups)} for plan in self.choice.cycle],
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
        return [
            Choice(mode, cycle, self._tokens_per_second(mode, cycle, chance, batch, context))
            for mode, cycle in candidates(self.block_len)
        ]

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

    def _tokens_per_second(
        self, mode: str, cycle: tuple[StepPlan, ...], chance: Sequence[float], batch: int, context: int
    ) -> float:
        seconds = sum(self.table.seconds(plan.rows(self.block_len), batch, context) for plan in cycle)
        if mode == "autoregressive":
            tokens = 1.0
        elif mode == "two-pass":
            tokens = 1.0 + sum(n * p for n, p in enumerate(_lengths(cycle[1].clean_len, 0, chance), 1))
        else:
            tokens = expected_tokens(cycle[0], chance)
        return batch * tokens / seconds

    def _probe(self, pending: tuple[int, ...]) -> StepPlan:
        """One token a step; now and then one block is drafted, and then verified."""
        if max(pending) > 1:
            self._since_drafts = 0
            return StepPlan(self.block_len)
        self._since_drafts += 1
        return StepPlan(1, (1,)) if self._since_drafts >= PROBE_EVERY and self.block_len > 1 else StepPlan(1)


def _lengths(clean_len: int, late: int, chance: Sequence[float]) -> list[float]:
    """Law of the accepted length 1..clean_len, where pending drafts came from the masks after `late`."""
    drafts = max(0, min(clean_len, len(chance) - late) - 1)
    survival = list(accumulate(chance[late + 1 : late + 1 + drafts], mul, initial=1.0))
    law = [a - b for a, b in zip(survival, [*survival[1:], 0.0])]
    return law + [0.0] * (clean_len - len(law))
