"""Table of the time that a decoder forward takes on this device.

How long does a forward take, by query tokens, batch and context?

`rows` counts the query tokens of one sequence. The free-token-slot curve: up to some number of query tokens a forward
costs little more than with one, because reading the weights dominates. Past the knee each query token adds its cost
(TiDAR, section 2).
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tidar_core.decoding.decode_forward import DecodeForward
from tidar_core.decoding.page_pool import page_count
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.timing import median_seconds
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["Curve", "LatencyPoint", "LatencyTable", "measure_latency"]

KNEE_COST = 1.25
"""Query tokens are free as long as a forward costs at most this many times a forward of one query token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPoint:
    """One measured shape."""

    rows: int
    """Query tokens of one sequence."""
    batch: int
    context: int
    """Clean tokens of each sequence in the cache."""
    seconds: float
    drafts: bool = False
    """Whether masks are among the query tokens and drafts are made of them, which costs a little more."""
    timed: bool = True
    """Whether the shape was timed; false for a prediction from other shapes."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured shapes, with interpolation between them."""

    points: tuple[LatencyPoint, ...]

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected seconds of a forward: linear between measured query tokens, contexts and batches.

        Beyond the largest batch or context it is the time of the largest. Beyond the most query tokens it continues the
        line between the last two.

        rows    query tokens of one sequence
        drafts  masks are among them; if no such shape was measured, shapes without masks are used
        """
        return self.curve(batch, context, drafts=drafts).seconds(rows)

    def curve(self, batch: int, context: int, *, drafts: bool = False) -> "Curve":
        """Curve over query tokens at one batch and context; `seconds` reads it."""
        return _between(
            self._curves,
            batch,
            lambda near: _between(
                self._curves[near],
                context,
                lambda far: self._curves[near][far].get(drafts) or self._curves[near][far][False],
            ),
        )

    def timed_curve(self, batch: int, context: int, drafts: bool) -> "Curve | None":
        """Curve of exactly this batch and context; None if it was not timed."""
        return self._curves.get(batch, {}).get(context, {}).get(drafts)

    def knee_rows(self, batch: int = 1) -> int:
        """Most measured query tokens that are still free, at the smallest context and at `batch` or the next larger."""
        near = next((b for b in self._curves if b >= batch), max(self._curves))
        curve = self._curves[near][min(self._curves[near])][False]
        return max(rows for rows, seconds in zip(curve.rows, curve.times) if seconds <= KNEE_COST * curve.times[0])

    @cached_property
    def _curves(self) -> dict[int, dict[int, dict[bool, "Curve"]]]:
        """Curves by batch, context and drafts; all keys ascend."""
        measured: dict[int, dict[int, dict[bool, dict[int, float]]]] = {}
        for p in sorted(self.points, key=lambda p: (p.batch, p.context, p.rows)):
            of_shape = measured.setdefault(p.batch, {}).setdefault(p.context, {})
            of_shape.setdefault(p.drafts, {})[p.rows] = p.seconds
        return {
            batch: {
                context: {drafts: Curve(tuple(times), tuple(times.values())) for drafts, times in of_shape.items()}
                for context, of_shape in of_batch.items()
            }
            for batch, of_batch in measured.items()
        }


@dataclass(frozen=True, slots=True)
class Curve:
    """Time as a function of the query tokens of a sequence."""

    rows: tuple[int, ...]
    """Query tokens, ascending."""
    times: tuple[float, ...]
    """Seconds at each entry of `rows`."""

    def seconds(self, rows: int) -> float:
        """Seconds at `rows` query tokens: linear between and beyond measured points, at least the shortest time."""
        if len(self.rows) == 1:
            return self.times[0]
        high = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        share = (rows - self.rows[high - 1]) / (self.rows[high] - self.rows[high - 1])
        return max(self.times[high - 1] + share * (self.times[high] - self.times[high - 1]), min(self.times))

    def towards(self, other: "Curve", share: float) -> "Curve":
        """Curve between this curve (share 0) and another (share 1)."""
        rows = tuple(sorted({*self.rows, *other.rows}))
        return Curve(rows, tuple((1 - share) * self.seconds(r) + share * other.seconds(r) for r in rows))


def _between(measured: Collection[int], value: int, at: Callable[[int], Curve]) -> Curve:
    """Interpolates between the neighbours of `value` among the ascending `measured`; constant beyond their ends."""
    shapes = list(measured)
    index = bisect_left(shapes, value)
    if index in (0, len(shapes)) or shapes[index] == value:
        return at(shapes[min(index, len(shapes) - 1)])
    low, high = shapes[index - 1], shapes[index]
    return at(low).towards(at(high), (value - low) / (high - low))


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
    """Time a forward of each shape and the logits of one query token of each sequence.

    Each time is the median of `repeats`, after a warm-up. Query tokens are clean tokens; mask tokens cost the same. The
    cost of verification is left out: it is the same in every mode.

    rows      query tokens of one sequence
    contexts  clean tokens of each sequence in the cache
    on_point  called after each shape
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

    read = DecodeForward(model, cache, positions=context + rows, block_len=1)
    pattern = QueryPattern.of(rows, (), 1, weight.device)

    def forward() -> None:
        used_pages = page_count(context, page_len)
        hidden = read(page_table_BN, prefix_B, token_BR, pattern, used_pages)
        model.head(hidden[:, -1:]).argmax(-1).tolist()

    return median_seconds([forward], repeats)[0]
