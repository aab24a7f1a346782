"""Choice of the decode plan that promises the most tokens per second.

Which mode, with which query tokens, is fastest right now?

The cost comes from a measured latency table, corrected by the steps that were served (`served_latency`). The loop's
own time is added (`loop_time`). The gain comes from the newest drafts (`draft_history`), which every plan would have
verified in its own way (`plan_replay`).
Autoregression is always among the candidates. Some steps are run to learn from (`learning_steps`).
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.step_plan import FixedMode, Planner, StepPlan
from tidar_core.planning.acceptance_rates import mean_rates
from tidar_core.planning.candidate_plans import Candidate, all_candidates, few_candidates
from tidar_core.planning.draft_history import DraftHistory
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.learning_steps import SHORTEST_PROBE, LearningSteps, compared_every, other_mode, probe_len
from tidar_core.planning.loop_time import LoopTime
from tidar_core.planning.plan_replay import PlanChain, expected_tokens, lost_tokens, two_pass_chain
from tidar_core.planning.reviews import MAX_INDIVIDUAL_BATCH, Choice, Review, Reviews
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
"""The mode that switches between all others."""

HYSTERESIS = 1.02
"""A new choice must promise this many times the tokens per second of the present one."""
MIN_SPEEDUP_TO_DRAFT = 1.02
"""To begin to draft, a choice must promise this many times the tokens per second of the autoregressive mode, because a
forecast is never exact. To go on, it must promise more than that mode."""
MIN_VERIFICATIONS = 32
"""Verifications after which such a request has a review of its own; until then it shares the review of others."""
PROBE_SHARE, LONGEST_PROBE = 0.005, 8192
"""Share of its time that the autoregressive choice spends on probes, and the most steps from one to the next."""
LEARNED_TOGETHER, LEARNED_AFTER = 32, 0.02
"""Most steps that are learned from together, and most seconds from the first to the last of them. In a step of half a
millisecond, code that runs once is in no cache and takes three times as long as in a loop."""
KNOWN_DOUBT, MOST_UNTIMED = 0.05, 4
"""Doubt about the time of a plan (standard deviation of its logarithm) that is small enough. Plans with more of it are
run now and then if their candidate could be the best for all that is known. So many take turns."""


def planner_of(mode: str, decoder: Decoder, table: LatencyTable | None = None) -> Planner:
    """The planner of a mode for a decoder; `auto` needs the latency table of its device.

    If steps are captured, only the few candidates that the table was measured with are compared: they are captured
    already.
    """
    block_len = decoder.draft.block_len
    if mode != AUTO:
        return FixedMode(mode, block_len)
    assert table is not None, "auto needs a latency table"
    candidates = few_candidates(block_len) if decoder.captures else None
    return AutoPlanner(
        table, block_len, candidates, queued=decoder.device.type == "cuda", computed_slots=decoder.computed_slots
    )


class AutoPlanner:
    """Picks the candidate with the highest expected speed.

    Reviews the choice as acceptance rates are learned, and keeps it unless another candidate is clearly faster.
    """

    def __init__(
        self,
        table: LatencyTable,
        block_len: int,
        candidates: Sequence[Candidate] | None = None,
        *,
        queued: bool = False,
        computed_slots: Callable[[int], int] = lambda batch: batch,
        clock: Clock = time.perf_counter,
    ) -> None:
        """candidates      autoregression first; `all_candidates` by default
        queued          whether a step waits for the prefill before it: the device computes later than it is called
        computed_slots  slots that a step of a batch computes; the batch by default
        clock           seconds, ascending; read before and after each step
        """
        self.block_len, self._queued, self._clock = block_len, queued, clock
        self._computed_slots = computed_slots
        self.latency, self.loop = ServedLatency(table), LoopTime()
        self.candidates = candidates or all_candidates(block_len)
        self._chains = {x.cycle: self._chain(x) for x in self.candidates if x.mode != "autoregressive"}
        self.choice = Choice("autoregressive", (StepPlan(1),), 0.0)
        if block_len > 1:
            self.choice = Choice("single-pass", (StepPlan(block_len, (1,), block_len),), 0.0)
        self.autoregressive_tokens_per_second = 0.0
        self.reviews, self._prefill_began, self._learned = Reviews(clock), 0.0, 0.0
        self._seen: list[tuple[_Launched | None, float, tuple[DecodeStep, ...], bool]] = []
        """Steps that were not learned from yet: the time at which each ended, and whether it read prompts too."""
        self._launched: _Launched | None = None
        self._ended: float | None = None
        """Time at which the last decode step ended, if only the loop's own work came after it."""
        self._served: frozenset[str] = frozenset()
        """Requests of the last step that was learned from."""
        self.forget_drafts()
        self._tokens(self._chains.values())  # what all reviews share is computed before the first request

    def forget_drafts(self) -> None:
        """Forget how often drafts were accepted: they are made by other weights from now on."""
        self.learn()
        self.history = DraftHistory(self.block_len)
        self._learning = LearningSteps(self.block_len)
        self._calm = _Calm(self.choice, frozenset())
        self.reviews.forget()

    @property
    def drafts_first_blocks(self) -> bool:
        """Only in single-pass mode: two-pass rounds keep one rhythm for the whole batch."""
        return self.choice.mode == "single-pass"

    def begin_prefill(self) -> None:
        """Note the time."""
        self._prefill_began = self._clock()

    def end_prefill(self) -> None:
        """Count the time since `begin_prefill`."""
        self.loop.add_prefill(self._clock() - self._prefill_began)
        self._ended = None

    def next_plan(self, pending: Mapping[str, int], context: int) -> StepPlan:
        """The plan of the choice; if no draft is pending, drafts are made first.

        pending   tokens pending (d_1 and its drafts) of each running request
        context   tokens of the longest sequence in the cache
        """
        began = self._clock()
        gap = None if self._ended is None else began - self._ended
        calm, most = self._calm, max(pending.values())
        if calm.left and calm.requests == pending.keys() and (most == 1 or calm.drafts):
            calm.left -= 1
            calm.passed += 1
            plan = calm.plans[most > 1]
        else:
            plan, calm = self._weighed_plan(pending, most, context)
            began = self._clock()
        self._launched = plan, calm.requests, context, gap, began
        return plan

    def _weighed_plan(self, pending: Mapping[str, int], most: int, context: int) -> tuple[StepPlan, "_Calm"]:
        """The plan of the next step, and the run of the choice's own plans that follows."""
        self.reviews.skip(self._calm.passed)
        self._learning.skip(self._calm.passed, self._calm.choice.mode)
        review, requests = self.reviews.holding(pending.keys()) or self._next_review(pending, context)
        choice = review.choice
        if review.untimed:
            self.learn()
        untimed = [plan for plan in review.untimed if self._doubt(plan, len(pending)) > KNOWN_DOUBT]
        plan = self._learning.next_plan(review, most, untimed)
        self._calm = calm = _Calm(choice, requests)
        if plan == calm.plans[most > 1]:
            calm.left = min(self._learning.calm(review, untimed=bool(untimed)), self.reviews.calm())
        return plan, calm

    def observe(self, steps: Sequence[DecodeStep], *, beside: bool = False) -> None:
        """Learn the time of the step that `next_plan` planned, and which drafts were accepted.

        beside  whether its forward read prompts too: time beyond the forecast then counts as theirs
        """
        ended = self._clock()
        self._seen.append((self._launched, ended, tuple(steps), beside))
        self._ended = ended
        self._launched = None
        if len(self._seen) == LEARNED_TOGETHER or ended >= self._learned + LEARNED_AFTER:
            self.learn()

    def learn(self) -> None:
        """Learn from all steps that were observed; several are learned from together, if they are short."""
        seen, self._seen = self._seen, []
        for launched, ended, steps, beside in seen:
            self._learned = ended
            if launched is not None:
                self._learn_time(launched, ended, beside=beside)
            self._learn_drafts(steps)

    def _learn_time(self, launched: "_Launched", ended: float, *, beside: bool) -> None:
        plan, requests, context, gap, began = launched
        if gap is not None and not self._served.isdisjoint(requests):
            self.loop.add_gap(gap)
        self._served = requests
        seconds, rows, drafts = ended - began, plan.query_tokens(self.block_len), bool(plan.groups)
        batch = self._computed_slots(len(requests))
        if beside:
            forecast = min(seconds, self.latency.seconds(rows, batch, context, drafts=drafts) * self.latency.slowdown)
            self.loop.add_prefill(seconds - forecast)
            seconds = forecast
        elif gap is not None or not self._queued:
            self.latency.observe(rows, batch, context, drafts, seconds, ended)
        self.reviews.add_step(seconds, len(requests))

    def _learn_drafts(self, steps: Sequence[DecodeStep]) -> None:
        individual, tokens, ended = len(steps) <= MAX_INDIVIDUAL_BATCH, 0, 0
        for step in steps:
            tokens += len(step.token_ids)
            ended += step.finish_reason is not None
            if self.history.observe(step) == MIN_VERIFICATIONS and individual:
                self._calm.left = 0
                self.reviews.look_again()
        self.loop.add_step(tokens, ended)
        self.reviews.add_texts(ended)

    def facts(self) -> dict[str, Any]:
        """The current choice, its expected speed and speedup, and the acceptance rates so far; for reports."""
        self.learn()
        return {
            "mode": self.choice.mode,
            "plans": [
                {"verified": plan.clean_len, "groups": list(plan.groups), "masks": plan.masks(self.block_len)}
                for plan in self.choice.cycle
            ],
            "expected_tokens_per_second": self.expected_tokens_per_second(self.choice.tokens_per_second),
            "expected_over_ar": self.expected_over_ar,
            "chances": mean_rates(self.history.excerpt().windows, self.block_len),
        }

    def expected_tokens_per_second(self, decoding: float) -> float:
        """Speed of the loop at the machine's present speed, prefills included.

        decoding  tokens per second without prefills, at the machine's speed when the table was measured
        """
        if not decoding:
            return 0.0
        return 1.0 / (self.latency.slowdown / decoding + self.loop.token_seconds)

    @property
    def expected_over_ar(self) -> float:
        """Tokens per second that the choice promises over those of the autoregressive mode; 1 before any review."""
        if not self.autoregressive_tokens_per_second:
            return 1.0
        speeds = (self.choice.tokens_per_second, self.autoregressive_tokens_per_second)
        drafted, autoregressive = (self.expected_tokens_per_second(speed) for speed in speeds)
        return drafted / autoregressive

    def weigh(self, requests: Collection[str], context: int, *, alike: bool = False) -> list[Choice]:
        """All candidates with their expected speed for a batch of these requests.

        context   tokens of the longest sequence in the cache
        alike     whether requests of a small batch count with the acceptance rates of all, as those of a large one do
        """
        self.learn()
        accepted = dict(zip(self._chains, self._tokens(self._chains.values(), () if alike else requests)))
        plans = dict.fromkeys(plan for candidate in self.candidates for plan in candidate.cycle)
        loop, batch = self.loop.step_seconds, len(requests)
        step_seconds = {plan: self._forward_seconds(plan, batch, context) + loop for plan in plans}
        choices = []
        for candidate in self.candidates:
            mode, cycle = candidate.mode, candidate.cycle
            # an autoregressive step and the drafting pass of two passes commit a token too
            tokens = accepted.get(cycle, 0.0) + (mode != "single-pass")
            tokens /= 1.0 + lost_tokens(mode, tokens) * self.loop.texts_per_token
            seconds = sum(step_seconds[plan] for plan in cycle)
            choices.append(Choice(mode, cycle, batch * tokens / seconds))
        return choices

    def _forward_seconds(self, plan: StepPlan, batch: int, context: int) -> float:
        """Expected seconds of a plan, without the loop's own."""
        rows, drafts = plan.query_tokens(self.block_len), bool(plan.groups)
        return self.latency.seconds(rows, self._computed_slots(batch), context, drafts=drafts)

    def _chain(self, candidate: Candidate) -> PlanChain:
        if candidate.mode == "single-pass":
            return PlanChain.of(candidate.cycle[0], self.block_len)
        return two_pass_chain(candidate.cycle[1].clean_len, candidate.cycle[0].masks(self.block_len))

    def _tokens(self, chains: Collection[PlanChain], requests: Collection[str] = ()) -> list[float]:
        """Accepted length of each chain; a lone request counts with its own drafts, others with those of all."""
        if not chains:
            return []
        lone = next(iter(requests)) if 0 < len(requests) <= MAX_INDIVIDUAL_BATCH else None
        return expected_tokens(chains, self.history.excerpt(lone), self.block_len)

    def _next_review(self, pending: Mapping[str, int], context: int) -> tuple[Review, frozenset[str]]:
        """Look for the review that holds from now on, and its requests."""
        self.learn()
        if len(self.history) > 2 * len(pending):  # aborted requests never report a finish
            self.history.keep(pending)
        few = pending if len(pending) <= MAX_INDIVIDUAL_BATCH and self.reviews.individual else ()
        known = any(self.history.verifications(request) >= MIN_VERIFICATIONS for request in few)
        review, requests = self.reviews.look(
            pending.keys(), lambda last, alike: self._reviewed(pending, context, last, alike=alike), known=known
        )
        self.choice, self.autoregressive_tokens_per_second = review.choice, review.autoregressive_tokens_per_second
        return review, requests

    def _reviewed(self, requests: Collection[str], context: int, last: Review | None, *, alike: bool) -> Review:
        """A new review in place of the last one; see `weigh`."""
        self.latency.refit()
        ar, *others = choices = self.weigh(requests, context, alike=alike)
        best = max(others, key=lambda choice: choice.tokens_per_second, default=ar)
        held = self.choice if last is None else last.choice
        present = next((choice for choice in others if choice.cycle == held.cycle), ar)
        if present is not ar and best.tokens_per_second < HYSTERESIS * present.tokens_per_second:
            best = present
        least = 1.0 if last is not None and best is present else MIN_SPEEDUP_TO_DRAFT
        if best.tokens_per_second <= least * ar.tokens_per_second:
            best = ar
        probe_every = self._probe_every(requests, context) if best is ar else 0
        untimed = self._untimed(others, best, len(requests))
        margin = math.log(best.tokens_per_second / ar.tokens_per_second)
        step = self._forward_seconds(best.cycle[-1], len(requests), context)
        compared = compared_every(margin, self.latency.steady_seconds(margin) / step)
        return Review(best, ar.tokens_per_second, probe_every, untimed, *other_mode(choices, best), compared)

    def _untimed(self, choices: Sequence[Choice], best: Choice, batch: int) -> tuple[StepPlan, ...]:
        """Plans whose time is in doubt, of choices that it could make the best, the most promising first."""
        doubts = {plan: self._doubt(plan, batch) for choice in choices for plan in choice.cycle}
        promising = sorted(choices, key=lambda choice: choice.tokens_per_second, reverse=True)
        found: dict[StepPlan, None] = {}
        for choice in promising:
            lacking = math.log(best.tokens_per_second / choice.tokens_per_second)
            found |= dict.fromkeys(p for p in choice.cycle if doubts[p] > max(KNOWN_DOUBT, lacking))
        return tuple(islice(found, MOST_UNTIMED))

    def _doubt(self, plan: StepPlan, batch: int) -> float:
        rows, slots = plan.query_tokens(self.block_len), self._computed_slots(batch)
        return self.latency.doubt(rows, slots, drafts=bool(plan.groups))

    def _probe_every(self, requests: Collection[str], context: int) -> int:
        """Autoregressive steps from one probe to the next, so that probes take PROBE_SHARE of the time.

        0 if a block is one token: there is nothing to probe.
        """
        if self.block_len == 1:
            return 0
        P, batch = probe_len(self.block_len), len(requests)
        plans = (StepPlan(1, (1,), P), StepPlan(P), StepPlan(1))
        loop = self.loop.step_seconds
        drafting, verifying, ar = (self._forward_seconds(plan, batch, context) + loop for plan in plans)
        lost = (drafting + verifying) / ar - 1.0 - self._tokens([two_pass_chain(P, P)], requests)[0]
        return int(min(max(lost / PROBE_SHARE, SHORTEST_PROBE), LONGEST_PROBE))


_Launched = tuple[StepPlan, frozenset[str], int, float | None, float]
"""The step that was planned last: its plan, requests and context, the seconds since the step before it, and the time at
which it began. If a prefill came between the two, the seconds are None."""


class _Calm:
    """A run of steps in which the plan is the choice's own, as long as the requests stay the same."""

    __slots__ = ("choice", "drafts", "left", "passed", "plans", "requests")

    def __init__(self, choice: Choice, requests: frozenset[str]) -> None:
        self.choice, self.requests = choice, requests
        self.plans = choice.next_plan(1), choice.next_plan(2)
        """Plans where no draft is pending, and where some are."""
        self.drafts = choice.mode != "autoregressive"
        self.left = self.passed = 0
        """Steps of the run that are left, and those that were taken."""
