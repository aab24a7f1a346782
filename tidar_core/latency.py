"""How long does one decoder forward take on this device, by rows, batch and context?

The free-token-slot curve: up to some number of rows a forward costs little more than one row does, because reading the
weights dominates; past the knee each row is paid for (TiDAR, section 2).
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tidar_core.decode_forward import DecodeForward
from tidar_core.decoder import Decoder
from tidar_core.kv_cache import KVCache
from tidar_core.model import TidarModel
from tidar_core.pages import page_count
from tidar_core.ways import few_ways, timed_plans

__all__ = ["LatencyPoint", "LatencyTable", "decoding_latency", "latency_shapes", "measure_latency"]

KNEE_COST = 1.25
"""Rows are free as long as a forward costs at most this many times what one row costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPoint:
    """One measured shape."""

    rows: int
    """Rows of one sequence."""
    batch: int
    context: int
    """Clean tokens of each sequence in the cache."""
    seconds: float
    drafts: bool = False
    """Masks are among the rows, and drafts are made of them, which costs a little more."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured shapes, and what lies between them."""

    points: tuple[LatencyPoint, ...]

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected time of a forward: linear in rows between measured ones, at the next larger measured batch and
        context (the largest beyond that).

        drafts  masks are among the rows; where none such was measured, the others stand for them
        """
        curve = self._curve(batch, context, drafts) or self._curve(batch, context, False)
        index = min(max(1, bisect_left([p.rows for p in curve], rows)), len(curve) - 1)
        low, high = curve[max(0, index - 1)], curve[index]
        if low.rows == high.rows:
            return low.seconds
        slope = (high.seconds - low.seconds) / (high.rows - low.rows)
        return max(low.seconds + slope * (rows - low.rows), min(p.seconds for p in curve))

    def knee_rows(self, batch: int = 1) -> int:
        """The most measured rows that are still free at the smallest context."""
        curve = self._curve(batch, 0, False)
        return max(point.rows for point in curve if point.seconds <= KNEE_COST * curve[0].seconds)

    def _curve(self, batch: int, context: int, drafts: bool) -> list[LatencyPoint]:
        batches = sorted({p.batch for p in self.points})
        near = batches[min(bisect_left(batches, batch), len(batches) - 1)]
        contexts = sorted({p.context for p in self.points if p.batch == near})
        far = contexts[min(bisect_left(contexts, context), len(contexts) - 1)]
        here = [p for p in self.points if (p.batch, p.context, p.drafts) == (near, far, drafts)]
        return sorted(here, key=lambda p: p.rows)


def decoding_latency(
    decoder: Decoder, *, context_len: int | None = None, repeats: int = 9, on_point: Callable[[], None] = lambda: None
) -> LatencyTable:
    """The table that a decoder plans with: whole decode steps, verification included, at the row counts of its modes.

    context_len  longest context that is planned for; the decoder's own by default
    on_point     called after each of `latency_shapes`
    """
    K, points = decoder.draft.block_len, []
    plans = timed_plans(few_ways(K))
    for batch, context in latency_shapes(decoder, context_len):
        with decoder.rehearsal(batch, context) as step:
            times = _median_seconds([partial(step, plan) for plan in plans], repeats)
        for (rows, drafts), seconds in {(p.rows(K), bool(p.groups)): t for p, t in zip(plans, times)}.items():
            points.append(LatencyPoint(rows=rows, batch=batch, context=context, seconds=seconds, drafts=drafts))
        on_point()
    return LatencyTable(tuple(points))


def latency_shapes(decoder: Decoder, context_len: int | None = None) -> list[tuple[int, int]]:
    """Batches and contexts that `decoding_latency` times."""
    longest = min(context_len or decoder.context_len, decoder.context_len)
    batches = [count for count in (1, 4, 16, 64) if count < decoder.rows] + [decoder.rows]
    contexts = [count for count in (128, 1024, 8192) if count < longest] + [longest]
    return [(batch, context) for batch in batches for context in contexts]


@torch.inference_mode()
def measure_latency(
    model: TidarModel,
    *,
    rows: Sequence[int],
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (256,),
    repeats: int = 5,
    on_point: Callable[[], None] = lambda: None,
) -> LatencyTable:
    """Time a forward of each shape and the logits of one row of each sequence: median of `repeats`, after a warm-up.

    Rows are clean tokens; mask rows cost the same. What verification adds is the same in every mode.
    """
    points = []
    for batch in batches:
        for context in contexts:
            for count in rows:
                seconds = _time_forward(model, count, batch, context, repeats)
                points.append(LatencyPoint(rows=count, batch=batch, context=context, seconds=seconds))
                on_point()
    return LatencyTable(tuple(points))


def _time_forward(model: TidarModel, rows: int, batch: int, context: int, repeats: int) -> float:
    weight, page_len = model.embedding.weight, 16
    pages = page_count(context + rows, page_len)
    cache = KVCache(model.config, pages=batch * pages, page_len=page_len, dtype=weight.dtype, device=weight.device)
    page_table_BN = 1 + torch.arange(batch * pages, device=weight.device).view(batch, pages)
    prefix_B = torch.full((batch,), context, dtype=torch.long, device=weight.device)
    token_BR = torch.zeros(batch, rows, dtype=torch.long, device=weight.device)

    read = DecodeForward(model, cache)

    def forward() -> None:
        used_pages = page_count(context, page_len)
        hidden = read(page_table_BN, prefix_B, token_BR, (), 1, used_pages)
        model.head(hidden[:, -1:]).argmax(-1).tolist()

    return _median_seconds([forward], repeats)[0]


def _median_seconds(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Of `repeats` of each, in turns: what disturbs the machine for a while disturbs all. Each is run once before it is
    timed, so that none pays for what its neighbour left in the caches."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times):
            run()
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]
