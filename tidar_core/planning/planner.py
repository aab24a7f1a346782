"""Which mode, with which rows, brings the most tokens per second right now?

Cost comes from a measured latency table, corrected by the steps that were served (`served_latency`). Gain comes from
how often drafts were accepted so far (`acceptance`). Autoregression is always among the candidates.
"""

import time
from collections.abc import Collection, KeysView, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.step_plan import FixedMode, Planner, StepPlan
from tidar_core.planning.acceptance_model import (
    NONE,
    Acceptance,
    Chances,
    PlanChain,
    expected_tokens,
    mood_after,
    two_pass_walk,
)
from tidar_core.planning.candidate_plans import Candidate, all_candidates, few_ways
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.served_latency import ServedLatency
from tidar_core.timing import Clock

__all__ = [
    "AUTO",
    "MIN_SPEEDUP_TO_DRAFT",
    "MIN_VERIFICATIONS",
    "AutoPlanner",
    "Choice",
    "planner_of",
]

AUTO = "auto"
"""The mode that is all others, by turns."""

HYSTERESIS = 1.03
"""A new choice must promise this many times the tokens per second of the present one."""
MIN_SPEEDUP_TO_DRAFT = 1.1
"""To draft at all, a choice must promise this many times those of the autoregressive mode: a table is never exact."""
FIRST_REVIEW, LONGEST_REVIEW = 24, 256
"""Decode steps before a new choice is reviewed, and between reviews later: the gap doubles as long as it holds."""
MAX_INDIVIDUAL_BATCH = 1
"""Up to so many requests, each counts with its own drafts: texts differ much. More are weighed as one, since a review
takes as long for each."""
MIN_VERIFICATIONS = 32
"""Verifications after which such a request is reviewed by itself; before, the review of those before it holds."""
PROBE_COST = 0.005
"""Share of the time that the autoregressive choice spends on seeing whether drafting would pay by now: a block is
drafted and verified as often as that allows."""
SHORTEST_PROBE, LONGEST_PROBE = 32, 1024
"""Autoregressive steps from one such block to the next."""
FIRST_COMPARISON, COMPARED_EVERY = 32, 256
"""While drafts are made, one step in so many is autoregressive: its time is what drafting must beat. The gap doubles
from the first to the second number."""


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


class AutoPlanner:
    """Picks the choice that promises most; reviews it as acceptance is learned, keeps to it unless clearly beaten."""

    def __init__(
        self,
        table: LatencyTable,
        block_len: int,
        ways: Sequence[Candidate] | None = None,
        *,
        clock: Clock = time.perf_counter,
    ) -> None:
        """ways   candidates, autoregression first; many by default
        clock  seconds, ascending; read before and after each step
        """
        self.block_len, self._clock = block_len, clock
        self.latency = ServedLatency(table)
        self.ways = ways or all_candidates(block_len)
        self.acceptance = Acceptance(block_len)
        """Of all requests so far."""
        self.choice = Choice("autoregressive", (StepPlan(1),), 0.0)
        if block_len > 1:
            self.choice = Choice("single-pass", (StepPlan(block_len, (1,), block_len),), 0.0)
        self.autoregressive_tokens_per_second = 0.0
        self._own: dict[str, _Own] = {}
        """Of each running request."""
        self._steps = self._since_drafts = 0
        self._reviews: dict[frozenset[str] | int, _Review] = {}
        self._launched: _Launched | None = None
        self._next_comparison = FIRST_COMPARISON

    @property
    def drafts_at_prefill(self) -> bool:
        """In single-pass mode only; two-pass rounds keep one rhythm for the whole batch."""
        return self.choice.mode == "single-pass"

    def next_plan(self, pending: Mapping[str, int], context: int) -> StepPlan:
        """The choice's plan; where nothing is pending to be verified, drafts are made first."""
        plan = self._planned(pending, context)
        self._launched = _Launched(plan, len(pending), context, self._clock())
        return plan

    def _planned(self, pending: Mapping[str, int], context: int) -> StepPlan:
        self._steps += 1
        if len(self._own) > 2 * len(pending):  # requests that were aborted never say that they finished
            self._own = {request: own for request, own in self._own.items() if request in pending}
        review = self._review(pending.keys(), context)
        self.choice, self.autoregressive_tokens_per_second = review.choice, review.autoregressive_tokens_per_second
        most = max(pending.values())
        if self.choice.mode == "autoregressive":
            return self._probe(most, review.probe_every)
        if self._steps >= self._next_comparison:
            self._next_comparison += min(self._next_comparison, COMPARED_EVERY)
            return StepPlan(1)
        if most > 1:
            return self.choice.cycle[-1]
        return replace(self.choice.cycle[0], clean_len=1, groups=(1,))

    def observe(self, steps: Sequence[DecodeStep]) -> None:
        """Learn from the decode step that `next_plan` planned: its time, and which drafts were accepted."""
        if (launched := self._launched) is not None:
            plan, seconds = launched.plan, self._clock() - launched.began
            rows, drafts = plan.rows(self.block_len), bool(plan.groups)
            self.latency.observe(rows, launched.batch, launched.context, drafts, seconds)
            self._launched = None
        for step in steps:
            if step.verified > 1:
                own = self._own.setdefault(step.request_id, _Own(Acceptance(self.block_len)))
                for acceptance in (own.acceptance, self.acceptance):
                    acceptance.observe(step, own.mood)
                own.mood, own.verifications = mood_after(own.mood, step), own.verifications + 1
            if step.finish_reason is not None:
                self._own.pop(step.request_id, None)

    def facts(self) -> dict[str, Any]:
        """What it holds to, what that promises over autoregression, and what it has learned; for reports."""
        return {
            "mode": self.choice.mode,
            "plans": [
                {"verified": plan.clean_len, "groups": list(plan.groups), "masks": plan.masks(self.block_len)}
                for plan in self.choice.cycle
            ],
            "expected_over_ar": self.expected_over_ar,
            "chances": asdict(self.acceptance.pooled()),
        }

    @property
    def expected_over_ar(self) -> float:
        """Tokens per second that the choice promises over those of the autoregressive mode; 1 before any review."""
        if not self.autoregressive_tokens_per_second:
            return 1.0
        return self.choice.tokens_per_second / self.autoregressive_tokens_per_second

    def weigh(self, requests: Collection[str], context: int) -> list[Choice]:
        """All candidates with what they promise for a batch of these requests."""
        drafting = {way.cycle: self._walk(way) for way in self.ways if way.mode != "autoregressive"}
        accepted = dict(zip(drafting, self._tokens(list(drafting.values()), requests)))
        curves = {drafts: self.latency.curve(len(requests), context, drafts=drafts) for drafts in (False, True)}
        choices = []
        for way in self.ways:
            # what draws up a block commits a token as well: all of an autoregressive step, the first of two passes
            tokens = accepted.get(way.cycle, 0.0) + (way.mode != "single-pass")
            seconds = sum(curves[bool(plan.groups)].seconds(plan.rows(self.block_len)) for plan in way.cycle)
            choices.append(Choice(way.mode, way.cycle, len(requests) * tokens / seconds))
        return choices

    def _walk(self, way: Candidate) -> PlanChain:
        if way.mode == "single-pass":
            return PlanChain.of(way.cycle[0], self.block_len)
        return two_pass_walk(way.cycle[1].clean_len, way.cycle[0].masks(self.block_len))

    def _tokens(self, walks: Sequence[PlanChain], requests: Collection[str]) -> list[float]:
        return expected_tokens(walks, *self._chances(requests)) if walks else []

    def _chances(self, requests: Collection[str]) -> list[list[Chances]]:
        """Of each request, where they are few; else of all that ever were."""
        own = [self._own.get(request) for request in requests] if len(requests) <= MAX_INDIVIDUAL_BATCH else [None]
        return [self.acceptance.moods() if known is None else known.acceptance.beside(self.acceptance) for known in own]

    def _review(self, requests: KeysView[str], context: int) -> "_Review":
        """What holds for a batch: what was found last, or found anew where that is due."""
        own = [self._own.get(request) for request in requests] if len(requests) <= MAX_INDIVIDUAL_BATCH else []
        known = any(one is not None and one.verifications >= MIN_VERIFICATIONS for one in own)
        crowd = frozenset(requests) if known else len(requests)
        last = self._reviews.get(crowd)
        if last is not None and self._steps < last.due:
            return last
        if last is None:  # reviews of lone requests that are gone
            self._reviews = {known: review for known, review in self._reviews.items() if isinstance(known, int)}
        ar, *others = self.weigh(requests, context)
        best = max(others, key=lambda choice: choice.tokens_per_second, default=ar)
        held = self.choice if last is None else last.choice
        present = next((choice for choice in others if choice.cycle == held.cycle), ar)
        if best.tokens_per_second < MIN_SPEEDUP_TO_DRAFT * ar.tokens_per_second:
            best = ar
        elif present is not ar and best.tokens_per_second < HYSTERESIS * present.tokens_per_second:
            best = present
        holds = last is not None and last.choice.cycle == best.cycle
        gap = min(2 * last.gap, LONGEST_REVIEW) if last is not None and holds else FIRST_REVIEW
        probe_every = self._probe_every(requests, context) if best is ar else 0
        self._reviews[crowd] = _Review(best, ar.tokens_per_second, self._steps + gap, gap, probe_every)
        return self._reviews[crowd]

    def _probe_every(self, requests: Collection[str], context: int) -> int:
        """Autoregressive steps that a drafted block, and what it is thought to bring, may be lost among.

        0 where a block is one token: there is nothing to probe.
        """
        K, batch = self.block_len, len(requests)
        if K == 1:
            return 0
        drafting = self.latency.seconds(StepPlan(1, (1,), K).rows(K), batch, context, drafts=True)
        ar, verifying = (self.latency.seconds(rows, batch, context) for rows in (1, K))
        lost = (drafting + verifying) / ar - 1.0 - self._tokens([two_pass_walk(K, K)], requests)[0]
        return int(min(max(lost / PROBE_COST, SHORTEST_PROBE), LONGEST_PROBE))

    def _probe(self, pending: int, every: int) -> StepPlan:
        """One token a step; now and then one block is drafted, and then verified."""
        if pending > 1:
            self._since_drafts = 0
            return StepPlan(self.block_len)
        self._since_drafts += 1
        if not every or self._since_drafts < every:
            return StepPlan(1)
        return StepPlan(1, (1,), self.block_len)


@dataclass(frozen=True, slots=True)
class _Launched:
    """The step that was planned last."""

    plan: StepPlan
    batch: int
    context: int
    began: float


@dataclass(slots=True)
class _Own:
    """What is known of one request."""

    acceptance: Acceptance
    mood: int = NONE
    verifications: int = 0


@dataclass(frozen=True, slots=True)
class _Review:
    choice: Choice
    autoregressive_tokens_per_second: float
    due: int
    """Decode step at which the next is made."""
    gap: int
    probe_every: int
    """Where the choice is autoregressive: steps from one drafted block to the next."""
