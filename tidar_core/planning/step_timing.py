"""Latency table of a decoder's whole decode steps, measured within a time budget.

How long do decode steps take, when there is little time to measure them?

Whole decode steps are timed, verification included, at a few batches and contexts, the smallest first. A step is left
out if it may take a large part of the time that is left. The formula of the table gives its time (`latency_formula`).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.candidate_plans import few_candidates, timed_plans
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.timing import Clock, seconds_of

__all__ = ["BUDGET_SECONDS", "decoding_latency", "latency_shapes"]

BUDGET_SECONDS = 20.0
"""Time for all shapes together, unless the caller gives another budget."""
LARGEST_SHARE = 0.25
"""Part of the time left that one step may take, its warm-up included."""
LEAST_TURNS, LEAST_SECONDS = 5, 0.3
"""Turns over all steps, and seconds, after which no turn begins: one slow moment of the machine must not count."""
FEW_PLANS = 5
"""Plans that are timed at every batch and context but the first, if no plan must be captured."""


def decoding_latency(
    decoder: Decoder,
    *,
    budget: float = BUDGET_SECONDS,
    context_len: int | None = None,
    repeats: int = 50,
    on_point: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Latency table for the planner of a decoder. Each time is a median over turns.

    budget       seconds; the first step is timed even if it takes longer
    context_len  longest context, in tokens; the decoder's own by default
    repeats      most turns over all steps, as long as the budget allows; there are more of short steps
    on_point     called after each batch and context of the first turn
    clock        seconds, ascending
    """
    began, K = clock(), decoder.draft.block_len
    end = began + budget
    plans = sorted(timed_plans(few_candidates(K)), key=lambda plan: (plan.query_tokens(K), bool(plan.groups)))
    shapes = latency_shapes(decoder, context_len)
    times: dict[_Step, list[float]] = {}
    for turn in range(repeats):
        if turn >= LEAST_TURNS and clock() - began >= min(LEAST_SECONDS, budget):
            break
        for index, (batch, context) in enumerate(shapes):
            every = index == 0 or decoder.captures
            with decoder.rehearsal(batch, context) as rehearse:
                for plan in plans if every else _spread(plans, FEW_PLANS):
                    step = _Step(plan.query_tokens(K), batch, context, bool(plan.groups))
                    if not times or 2 * _bound(step, times) <= LARGEST_SHARE * (end - clock()):
                        times.setdefault(step, []).append(seconds_of(partial(rehearse, plan), clock))
            if turn == 0:
                on_point()
    return LatencyTable(
        tuple(
            LatencyPoint(rows=step.rows, batch=step.batch, context=step.context, drafts=step.drafts,
                         seconds=statistics.median(of_step))
            for step, of_step in times.items()
        )
    )  # fmt: skip


def latency_shapes(decoder: Decoder, context_len: int | None = None) -> list[tuple[int, int]]:
    """Batches and contexts that `decoding_latency` covers, those with the fewest keys first."""
    longest = min(context_len or decoder.context_len, decoder.context_len)
    batches = [count for count in (1, 4, 16, 64) if count < decoder.slots] + [decoder.slots]
    contexts = [count for count in (128, 1024, 8192) if count < longest] + [longest]
    return sorted(((batch, context) for batch in batches for context in contexts), key=lambda s: (s[0] * s[1], s[0]))


@dataclass(frozen=True, slots=True)
class _Step:
    rows: int
    batch: int
    context: int
    drafts: bool


def _bound(step: _Step, times: Mapping[_Step, Sequence[float]]) -> float:
    """Seconds that a step takes at most: its cost grows no faster than its query tokens and its keys together."""
    return min(
        max(of_other)
        * max(1.0, step.rows * step.batch / (other.rows * other.batch))
        * max(1.0, step.batch * step.context / (other.batch * other.context))
        for other, of_other in times.items()
    )


def _spread(plans: Sequence[StepPlan], count: int) -> Sequence[StepPlan]:
    """Up to `count` plans, evenly spread, the first and the last among them."""
    if len(plans) <= count:
        return plans
    return [plans[round(i * (len(plans) - 1) / (count - 1))] for i in range(count)]
