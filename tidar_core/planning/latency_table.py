"""Table of the time that forwards or decode steps take on this device.

How long does a forward take, by query tokens, batch and context?

`rows` counts the query tokens of one sequence. The free-token-slot curve: up to some number of query tokens a forward
costs little more than with one, because reading the weights dominates. Past the knee each query token adds its cost
(TiDAR, section 2). A formula that is fitted to the table (`latency_formula`) gives the time of every other shape.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tidar_core.decoding.decode_forward import DecodeForward, QueryTokens
from tidar_core.decoding.page_pool import page_count
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.planning.latency_formula import LatencyFormula, LatencyPoint
from tidar_core.timing import seconds_of
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["LatencyTable", "measure_latency"]

KNEE_COST = 1.25
"""Query tokens are free as long as a forward costs at most this many times a forward of one query token."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured shapes."""

    points: tuple[LatencyPoint, ...]

    @cached_property
    def formula(self) -> LatencyFormula:
        """The formula that fits the measured shapes best."""
        return LatencyFormula.of(self.points)

    def knee_rows(self, batch: int = 1) -> int:
        """Most measured query tokens that are still free, at the smallest context and at `batch` or the next larger."""
        largest = max(point.batch for point in self.points)
        near = min((point.batch for point in self.points if point.batch >= batch), default=largest)
        short = min(point.context for point in self.points if point.batch == near)
        shape = (near, short, False)
        times = {p.rows: p.seconds for p in self.points if (p.batch, p.context, p.drafts) == shape}
        return max(rows for rows, seconds in times.items() if seconds <= KNEE_COST * times[min(times)])


@torch.inference_mode()
def measure_latency(
    model: TidarModel,
    *,
    rows: Sequence[int],
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (256,),
    repeats: int = 5,
    budget: float = 60.0,
    on_point: Callable[[], None] = lambda: None,
) -> LatencyTable:
    """Time a forward of each shape and the logits of one query token of each sequence.

    Each time is the median of up to `repeats`, after a warm-up. Query tokens are clean tokens; mask tokens cost the
    same. The cost of verification is left out: it is the same in every mode.

    rows      query tokens of one sequence
    contexts  clean tokens of each sequence in the cache
    budget    seconds for all shapes; a shape is repeated within its share, and a forward that takes longer runs once
    on_point  called after each shape
    """
    points, clock = [], time.perf_counter
    end = clock() + budget
    shapes = list(itertools.product(batches, contexts, rows))
    for left, (batch, context, count) in zip(range(len(shapes), 0, -1), shapes):
        forward, share, began = _forward(model, count, batch, context), (end - clock()) / left, clock()
        forward()
        times = [clock() - began]
        if times[0] < share:
            times = [seconds_of(forward)]
            while len(times) < repeats and clock() - began < share:
                times.append(seconds_of(forward))
        seconds = statistics.median(times)
        points.append(LatencyPoint(rows=count, batch=batch, context=context, seconds=seconds))
        on_point()
    return LatencyTable(tuple(points))


def _forward(model: TidarModel, rows: int, batch: int, context: int) -> Callable[[], None]:
    weight, page_len = model.embedding.weight, 16
    pages = page_count(context + rows, page_len)
    cache = KVCache(model.config, pages=batch * pages, page_len=page_len, dtype=weight.dtype, device=weight.device)
    page_table_BN = 1 + torch.arange(batch * pages, device=weight.device).view(batch, pages)
    prefix_B = torch.full((batch,), context, dtype=torch.long, device=weight.device)
    token_BR = torch.zeros(batch, rows, dtype=torch.long, device=weight.device)

    read = DecodeForward(model, cache, positions=context + rows, block_len=1)
    pattern = QueryPattern.of(rows, (), 1, weight.device)

    def forward() -> None:
        (hidden,) = read(QueryTokens(page_table_BN, prefix_B, token_BR, pattern, page_count(context, page_len)))
        model.head(hidden[:, -1:]).argmax(-1).tolist()

    return forward
