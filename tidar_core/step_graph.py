"""How is a decode step launched at once?

On a CUDA device the hundreds of kernels of a small forward take longer to launch than to run. Each shape of step is
captured when it is first met and replayed from then on: batch and used pages are rounded up, so that the shapes are
few; lengths, pages and sampling fields are tensors that stay where they are, so that one capture serves every content.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tidar_core.modes import StepPlan
from tidar_core.row_state import RowState
from tidar_core.step import Outcome, Stepper

__all__ = ["StepGraphs", "rounded"]

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and handles made outside of it."""

BATCH_BASE, PAGES_BASE = 2, 8
"""Batches are rounded up to powers of the one, since every row is computed; used pages to powers of the other, since a
program leaves at once where a prefix has no page."""


def rounded(count: int, most: int, base: int) -> int:
    """The next power of `base`, but no more than `most`; 0 stays 0."""
    power = 1
    while power < count:
        power *= base
    return min(most, power) if count else 0


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    outcome: Outcome


class StepGraphs:
    """Captured steps of one stepper, by shape."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._pool: Any = None
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def step(self, batch: int, plan: StepPlan, used_pages: int) -> Outcome:
        """`Stepper.step` without rules. Its tensors hold until the next call; rows behind `batch` mean nothing."""
        state: RowState = self._stepper.state
        batch = rounded(batch, state.rows, BATCH_BASE)
        used_pages = rounded(used_pages, state.page_table.shape[1], PAGES_BASE)
        key = (batch, plan, used_pages, state.sampling(slice(0, batch)).kind)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, plan, used_pages)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.outcome

    def _capture(self, batch: int, plan: StepPlan, used_pages: int) -> _Captured:
        before = self._stepper.state.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._stepper.step(batch, plan, used_pages)
                self._stepper.state.restore(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outcome = self._stepper.step(batch, plan, used_pages)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, outcome)
