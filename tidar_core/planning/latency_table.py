"""How long does one decoder forward take on this device, by rows, batch and context?

The free-token-slot curve: up to some number of rows a forward costs little more than one row does, because reading the
weights dominates; past the knee each row is paid for (TiDAR, section 2).
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tidar_core.decoding.decode_forward import DecodeForward
from tidar_core.decoding.page_pool import page_count
from tidar_core.decoding.plan_tensors import RowPattern
from tidar_core.timing import median_seconds
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["Curve", "LatencyPoint", "LatencyTable", "measure_latency"]

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
    timed: bool = True
    """False for a prediction from other shapes."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured shapes, and what lies between them."""

    points: tuple[LatencyPoint, ...]

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected time of a forward: linear between measured rows, contexts and batches. Beyond the largest batch or
        context it is that of the largest; beyond the most rows it goes on as between the last two.

        drafts  masks are among the rows; where none such was measured, the others stand for them
        """
        return self.curve(batch, context, drafts=drafts).seconds(rows)

    def curve(self, batch: int, context: int, *, drafts: bool = False) -> "Curve":
        """`seconds` of any rows at one batch and context."""
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
        """The curve of exactly this shape; None where it was not timed."""
        return self._curves.get(batch, {}).get(context, {}).get(drafts)

    def knee_rows(self, batch: int = 1) -> int:
        """The most measured rows that are still free, at the smallest context and at `batch` or the next larger."""
        near = next((b for b in self._curves if b >= batch), max(self._curves))
        curve = self._curves[near][min(self._curves[near])][False]
        return max(rows for rows, seconds in zip(curve.rows, curve.times) if seconds <= KNEE_COST * curve.times[0])

    @cached_property
    def _curves(self) -> dict[int, dict[int, dict[bool, "Curve"]]]:
        """By batch, context and drafts; all ascend."""
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
    """Time against rows of a sequence."""

    rows: tuple[int, ...]
    """Ascending."""
    times: tuple[float, ...]

    def seconds(self, rows: int) -> float:
        """Linear between measured rows and beyond them, but never less than anything measured."""
        if len(self.rows) == 1:
            return self.times[0]
        high = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        share = (rows - self.rows[high - 1]) / (self.rows[high] - self.rows[high - 1])
        return max(self.times[high - 1] + share * (self.times[high] - self.times[high - 1]), min(self.times))

    def towards(self, other: "Curve", share: float) -> "Curve":
        """The curve that lies so far on the way to another: 0 is here, 1 there."""
        rows = tuple(sorted({*self.rows, *other.rows}))
        return Curve(rows, tuple((1 - share) * self.seconds(r) + share * other.seconds(r) for r in rows))


def _between(measured: Collection[int], value: int, at: Callable[[int], Curve]) -> Curve:
    """Between the neighbours of `value` among the ascending `measured`; at their ends what was measured there."""
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

    read = DecodeForward(model, cache, positions=context + rows)
    pattern = RowPattern.of(rows, (), 1, weight.device)

    def forward() -> None:
        used_pages = page_count(context, page_len)
        hidden = read(page_table_BN, prefix_B, token_BR, pattern, used_pages)
        model.head(hidden[:, -1:]).argmax(-1).tolist()

    return median_seconds([forward], repeats)[0]
