"""Captures decode steps as CUDA graphs, so that a whole step is launched at once.

On a CUDA device the hundreds of kernels of a small forward take longer to launch than to run. Each shape of decode step
is captured when it is first met, and replayed from then on. Batch and used pages are rounded up, so that the shapes are
few. Lengths, pages and sampling fields are tensors with fixed addresses, so that one capture serves every content.

A capture knows addresses alone. Its inputs are kept by the runner, or beside the capture. Its results go to memory that
all captures share. Nothing else of a capture is kept, so that the next capture computes in the same memory.
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
"""Batches are rounded up to powers of BATCH_BASE, since every slot is computed. Used pages are rounded up to powers of
PAGES_BASE, since a program ends at once where a prefix has no page."""

_ONE_CAPTURE = threading.Lock()
"""A capture begins by waiting for the whole device, which may not be waited for while another thread captures."""


def rounded(count: int, most: int, base: int) -> int:
    """The next power of `base`, but no more than `most`; 0 stays 0."""
    power = 1
    while power < count:
        power *= base
    return min(most, power) if count else 0


class Recorder(Protocol):
    """Captures work on a device."""

    def record(self, run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        """Capture `run`; returns a function that repeats it at the same addresses.

        undo  reverts the effects of a run; called after each run that is not the capture itself
        """
        ...


class CudaRecorder:
    """CUDA graphs of one owner: on its own stream, in its own memory pool, undisturbed by what other threads launch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        """Capture `run`, as `Recorder` describes; `run` may only launch kernels."""
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
    """Captured decode steps of one runner, by shape."""

    def __init__(self, runner: DecodeStepRunner, recorder: Recorder) -> None:
        self._runner, self._recorder = runner, recorder
        self._outcomes = _SharedOutcomes(runner)
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def slots(self, batch: int) -> int:
        """Slots that a step of `batch` sequences computes."""
        return rounded(batch, self._runner.state.slots, BATCH_BASE)

    @property
    def captured(self) -> int:
        """Number of shapes that were captured so far."""
        return len(self._captured)

    def step(self, batch: int, plan: StepPlan, used_pages: int, *, scored: bool) -> Outcome:
        """Run `DecodeStepRunner.step` without rules. Its tensors are valid until the next call; entries beyond `batch`
        are undefined.

        scored  the logits of the autoregressive mode are wanted
        """
        state = self._runner.state
        batch = self.slots(batch)
        used_pages = rounded(used_pages, state.page_table.shape[1], PAGES_BASE)
        key = (batch, plan, used_pages, state.sampling(slice(0, batch)).kind, scored)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, plan, used_pages, scored)
        captured = self._captured[key]
        captured.replay()
        return captured.outcome

    def _capture(self, batch: int, plan: StepPlan, used_pages: int, scored: bool) -> "_Captured":
        runner, tensors = self._runner, self._runner.tensors_of(plan)
        outcome = self._outcomes.of(batch, plan.clean_len, scored)
        before = runner.state.snapshot()

        def run() -> None:
            found = runner.step(batch, tensors, used_pages)
            outcome.accepted_emitted.copy_(found.accepted_emitted)
            if outcome.ar_logits is not None and found.ar_logits is not None:
                outcome.ar_logits.copy_(found.ar_logits)

        return _Captured(self._recorder.record(run, lambda: runner.state.restore(before)), outcome, tensors)


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    outcome: Outcome
    tensors: PlanTensors
    """Kept for as long as the capture, which reads them by their addresses."""


class _SharedOutcomes:
    """Memory for the outcomes of all captured steps of a runner, as large as the largest outcome."""

    def __init__(self, runner: DecodeStepRunner) -> None:
        state = runner.state
        self._slots, self._block_len = state.draft.shape
        self._vocab_size, self._dtype = runner.model.config.vocab_size, runner.cache.pages.dtype
        self._accepted_emitted = torch.zeros(
            self._slots * (1 + self._block_len), dtype=torch.long, device=state.draft.device
        )
        self._logits: Tensor | None = None
        """Allocated when a request first wants log-probabilities."""

    def of(self, batch: int, clean_len: int, scored: bool) -> Outcome:
        """The part of the memory for a step of that shape, dense."""
        accepted_emitted = self._accepted_emitted[: batch * (1 + clean_len)].view(batch, 1 + clean_len)
        if not scored:
            return Outcome(accepted_emitted, None, None)
        if self._logits is None:
            size = self._slots * self._block_len * self._vocab_size
            self._logits = torch.empty(size, dtype=self._dtype, device=accepted_emitted.device)
        logits = self._logits[: batch * clean_len * self._vocab_size]
        return Outcome(accepted_emitted, logits.view(batch, clean_len, self._vocab_size), None)
