"""Latency table of a decoder's whole decode steps, measured within a time budget.

How long do decode steps take, when there is little time to measure them?

Whole decode steps are timed, verification included, at a few batches and contexts. The most informative shapes come
first, and within a shape the fewest query tokens. Shapes that the budget does not reach are predicted from timed
shapes. The cost of a forward follows its query tokens in total; the cost of its context is proportional to the batch.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

from tidar_core.decoding.decoder import Decoder
from tidar_core.planning.candidate_plans import few_candidates, timed_plans
from tidar_core.planning.latency_table import LatencyPoint, LatencyTable
from tidar_core.timing import LEAST_RUNS, Clock, median_seconds

__all__ = ["BUDGET_SECONDS", "decoding_latency", "latency_shapes"]

BUDGET_SECONDS = 20.0
"""Time for all shapes together, unless the caller gives another budget."""


def decoding_latency(
    decoder: Decoder,
    *,
    budget: float = BUDGET_SECONDS,
    context_len: int | None = None,
    repeats: int = 5,
    on_point: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Latency table for the planner of a decoder: every shape of `latency_shapes`, timed or predicted.

    budget       seconds; the first two plans are timed even if they take longer
    context_len  longest context, in tokens; the decoder's own by default
    repeats      turns over the plans of a shape, as long as the budget allows
    on_point     called after each shape
    clock        seconds, ascending
    """
    K, end = decoder.draft.block_len, clock() + budget
    points: list[LatencyPoint] = []
    plans = sorted(timed_plans(few_candidates(K)), key=lambda plan: (plan.query_tokens(K), bool(plan.groups)))
    shapes = latency_shapes(decoder, context_len)
    for index, (batch, context) in enumerate(shapes):
        left = end - clock()
        if points and left <= _least_seconds(points, batch):
            on_point()
            continue
        with decoder.rehearsal(batch, context) as step:
            runs = [partial(step, plan) for plan in plans]
            times = median_seconds(runs, repeats, clock, budget=_share(left, len(shapes) - index))
        for (rows, drafts), seconds in {(p.query_tokens(K), bool(p.groups)): t for p, t in zip(plans, times)}.items():
            points.append(LatencyPoint(rows=rows, batch=batch, context=context, seconds=seconds, drafts=drafts))
        on_point()
    return LatencyTable((*points, *_predicted(LatencyTable(tuple(points)), shapes)))


def latency_shapes(decoder: Decoder, context_len: int | None = None) -> list[tuple[int, int]]:
    """Batches and contexts that `decoding_latency` covers, the most informative first: smallest and largest of both."""
    longest = min(context_len or decoder.context_len, decoder.context_len)
    batches = [count for count in (1, 4, 16, 64) if count < decoder.slots] + [decoder.slots]
    contexts = [count for count in (128, 1024, 8192) if count < longest] + [longest]
    corners = [(batch, context) for context in _ends(contexts) for batch in _ends(batches)]
    return list(dict.fromkeys(corners + [(batch, context) for batch in batches for context in contexts]))


def _share(left: float, shapes: int) -> float:
    """Seconds for the next of so many shapes: twice its even share, since the first shapes are the most informative."""
    return left * min(1.0, 2 / shapes)


def _least_seconds(points: Sequence[LatencyPoint], batch: int) -> float:
    """Estimated seconds of the first two plans of a shape, from earlier points with as many query tokens."""
    longest = max(point.seconds for point in points if point.rows * point.batch <= 2 * batch)
    return 2 * LEAST_RUNS * longest


def _predicted(table: LatencyTable, shapes: Sequence[tuple[int, int]]) -> list[LatencyPoint]:
    """Points of the plans and shapes that were not timed."""
    first, known = shapes[0], {(p.batch, p.context, p.rows, p.drafts) for p in table.points}
    plans = [(p.rows, p.drafts) for p in table.points if (p.batch, p.context) == first]
    return [
        LatencyPoint(
            rows=rows, batch=batch, context=context, drafts=drafts, timed=False,
            seconds=_predict(table, (batch, context), first, rows, drafts),
        )
        for batch, context in shapes for rows, drafts in plans if (batch, context, rows, drafts) not in known
    ]  # fmt: skip


def _predict(table: LatencyTable, shape: tuple[int, int], first: tuple[int, int], rows: int, drafts: bool) -> float:
    """Seconds of a plan at a shape other than the first.

    Times of the same shape with fewer query tokens correct the prediction.
    """
    (batch, context), (first_batch, first_context) = shape, first
    at_first = table.curve(first_batch, first_context, drafts=drafts)
    near = table.timed_curve(batch, first_context, drafts)
    far = table.timed_curve(first_batch, context, drafts)

    def from_others(count: int) -> float:
        """Seconds of as many query tokens in total, plus the cost of the context once for each sequence."""
        here = at_first.seconds(count * batch // first_batch) if near is None else near.seconds(count)
        further = 0.0 if far is None else max(0.0, far.seconds(count) - at_first.seconds(count))
        return here + further * batch / first_batch

    own = table.timed_curve(batch, context, drafts)
    if own is None:
        return from_others(rows)
    return from_others(rows) * own.times[-1] / from_others(own.rows[-1])


def _ends(ascending: Sequence[int]) -> list[int]:
    return list(dict.fromkeys((ascending[0], ascending[-1])))
