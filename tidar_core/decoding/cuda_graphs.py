"""How is a decode step launched at once?

On a CUDA device the hundreds of kernels of a small forward take longer to launch than to run. Each shape of step is
captured when it is first met and replayed from then on: batch and used pages are rounded up, so that the shapes are
few; lengths, pages and sampling fields are tensors that stay where they are, so that one capture serves every content.

A capture knows addresses alone. What it reads is kept by the stepper, or beside the capture. What it finds out goes to
memory that all captures share: nothing else of a capture is kept, so that the next one computes in the same memory.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tidar_core.decoding.decode_step import DecodeStepRunner, Outcome
from tidar_core.decoding.plan_tensors import PlanTensors
from tidar_core.decoding.step_plan import StepPlan

__all__ = ["CudaRecorder", "Recorder", "StepGraphs", "rounded"]

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and handles made outside of it."""

BATCH_BASE, PAGES_BASE = 2, 8
"""Batches are rounded up to powers of the one, since every row is computed; used pages to powers of the other, since a
program leaves at once where a prefix has no page."""

_ONE_CAPTURE = threading.Lock()
"""A capture begins by waiting for the whole device, which may not be waited for while another thread captures."""


def rounded(count: int, most: int, base: int) -> int:
    """The next power of `base`, but no more than `most`; 0 stays 0."""
    power = 1
    while power < count:
        power *= base
    return min(most, power) if count else 0


class Recorder(Protocol):
    """What captures work on a device."""

    def record(self, run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        """A function that does again, at the same addresses, what `run` did.

        undo  takes back what a run has done; called after each run that is not the capture itself
        """
        ...


class CudaRecorder:
    """CUDA graphs of one owner: on its own stream, in its own memory pool, undisturbed by what other threads launch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`; `run` may launch kernels alone."""
        with _ONE_CAPTURE:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
                    undo()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


class StepGraphs:
    """Captured steps of one stepper, by shape."""

    def __init__(self, stepper: DecodeStepRunner, recorder: Recorder) -> None:
        self._stepper, self._recorder = stepper, recorder
        self._outcomes = _SharedOutcomes(stepper)
        self._captured: dict[tuple[object, ...], _Captured] = {}

    @property
    def captured(self) -> int:
        """Shapes that were captured so far."""
        return len(self._captured)

    def step(self, batch: int, plan: StepPlan, used_pages: int, *, scored: bool) -> Outcome:
        """`DecodeStepRunner.step` without rules. Its tensors hold until the next call; rows behind `batch` are
        undefined.

        scored  the logits of the autoregressive mode are wanted
        """
        state = self._stepper.state
        batch = rounded(batch, state.rows, BATCH_BASE)
        used_pages = rounded(used_pages, state.page_table.shape[1], PAGES_BASE)
        key = (batch, plan, used_pages, state.sampling(slice(0, batch)).kind, scored)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, plan, used_pages, scored)
        captured = self._captured[key]
        captured.replay()
        return captured.outcome

    def _capture(self, batch: int, plan: StepPlan, used_pages: int, scored: bool) -> "_Captured":
        stepper, tensors = self._stepper, self._stepper.tensors_of(plan)
        outcome = self._outcomes.of(batch, plan.clean_len, scored)
        before = stepper.state.snapshot()

        def run() -> None:
            found = stepper.step(batch, tensors, used_pages)
            outcome.accepted_emitted.copy_(found.accepted_emitted)
            if outcome.ar_logits is not None and found.ar_logits is not None:
                outcome.ar_logits.copy_(found.ar_logits)

        return _Captured(self._recorder.record(run, lambda: stepper.state.restore(before)), outcome, tensors)


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    outcome: Outcome
    tensors: PlanTensors
    """Kept for as long as the capture, which reads them by their addresses."""


class _SharedOutcomes:
    """Where every captured step of a stepper leaves what it found out: room for the largest."""

    def __init__(self, stepper: DecodeStepRunner) -> None:
        state = stepper.state
        self._rows, self._block_len = state.draft.shape
        self._vocab_size, self._dtype = stepper.model.config.vocab_size, stepper.cache.pages.dtype
        self._accepted_emitted = torch.zeros(
            self._rows * (1 + self._block_len), dtype=torch.long, device=state.draft.device
        )
        self._logits: Tensor | None = None
        """Made when a request first asks for log-probabilities."""

    def of(self, batch: int, clean_len: int, scored: bool) -> Outcome:
        """The share of a step of that shape, dense."""
        accepted_emitted = self._accepted_emitted[: batch * (1 + clean_len)].view(batch, 1 + clean_len)
        if not scored:
            return Outcome(accepted_emitted, None, None)
        if self._logits is None:
            size = self._rows * self._block_len * self._vocab_size
            self._logits = torch.empty(size, dtype=self._dtype, device=accepted_emitted.device)
        logits = self._logits[: batch * clean_len * self._vocab_size]
        return Outcome(accepted_emitted, logits.view(batch, clean_len, self._vocab_size), None)
