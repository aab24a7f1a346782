"""Upper bound of a decoder's memory, computed before any is taken.

How much memory does a decoder take at most?

Weights, cache and tables have known sizes. A forward and its sampling take memory for a while. Its size is found by
running them on tensors without memory (torch's `meta` device), at the largest batch and context. The bound leaves out
the memory of libraries (a CUDA context, cuBLAS), partial sums of attention kernels, and the fragments of an
allocator.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidar_core.config import DraftConfig, ModelConfig, SamplingConfig
from tidar_core.decoding.batch_state import BatchState
from tidar_core.decoding.decode_forward import QueryTokens
from tidar_core.decoding.decode_step import DEFAULT_TUNING, DecodeStepRunner
from tidar_core.decoding.decoder_size import DecoderSize
from tidar_core.decoding.scheduler import PREFILL_TOKENS
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.kernels import PLAIN, reference
from tidar_core.kernels.linear import held_bytes
from tidar_core.planning.candidate_plans import few_candidates, timed_plans
from tidar_core.planning.decode_step_benchmark import random_model
from tidar_core.planning.planner import AUTO
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["LiveBytes", "MemoryBound", "memory_bound"]

META = torch.device("meta")
SORT_BYTES = 32
"""Scratch bytes per element that a CUDA device sorts: CUB's keys, values and indices, each twice. The two results
are not included."""
SAMPLED = SamplingConfig(temperature=1.0, top_k=1, top_p=0.5, min_p=0.1)
"""Sampling settings that take the most memory."""
MOST_TOP = 20
"""Most log-probabilities reported per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBound:
    """Bytes on the device, by use."""

    weights: int
    cache: int
    """Keys and values of all pages."""
    tables: int
    """State of the running sequences, rotations, and precomputed products."""
    captured_steps: int
    """Memory that all captured steps compute in, and their outcomes; 0 if no step is captured."""
    forwards: int
    """Memory of the largest forward without a capture while it runs: a prefill, or a step with rules."""
    sampling: int
    """Memory that temperature, top-k, top-p, min-p and beta add to `forwards`."""

    @property
    def total(self) -> int:
        """Sum of all uses."""
        return self.weights + self.cache + self.tables + self.captured_steps + self.forwards + self.sampling


@torch.inference_mode()
def memory_bound(
    config: ModelConfig,
    draft: DraftConfig,
    size: DecoderSize,
    *,
    dtype: torch.dtype,
    mode: str,
    device: str,
    weights: str | None = None,
) -> MemoryBound:
    """Bound of a decoder that runs in `mode` on a device of the kind `device`, such as cuda or cpu.

    weights  int8 or int4; None: weights of `dtype`
    """
    cuda = device == "cuda"
    held = held_bytes(random_model(config, dtype, META), device, weights)
    cache = KVCache(config, pages=size.pages, page_len=size.page_len, dtype=dtype, device=META).bytes
    one_layer = replace(config, layers=1)  # the memory of a forward does not depend on the number of layers
    model = random_model(one_layer, dtype, META)
    with LiveBytes(META, sort_bytes=SORT_BYTES if cuda else 0) as live:
        tested = _Tested(model, draft, size, cuda)
        tables = live.bytes - tested.stepper.cache.bytes
        greedy, sampled = (live.above(tested.runs(mode, sampling)) for sampling in (SamplingConfig(), SAMPLED))
    captured = 0
    if cuda:
        logits = size.slots * draft.block_len * config.vocab_size * dtype.itemsize
        captured = max(greedy, sampled) + logits + 8 * size.slots * (1 + draft.block_len)
    return MemoryBound(
        weights=held, cache=cache, tables=tables, captured_steps=captured,
        forwards=greedy, sampling=max(0, sampled - greedy),
    )  # fmt: skip


class _Tested:
    """Device side of a decoder with a full batch, on tensors without memory."""

    def __init__(self, model: TidarModel, draft: DraftConfig, size: DecoderSize, cuda: bool) -> None:
        self.model, self.size, self.block_len, self.cuda = model, size, draft.block_len, cuda
        config, dtype = model.config, model.embedding.weight.dtype
        cache = KVCache(config, pages=size.pages, page_len=size.page_len, dtype=dtype, device=META)
        vocab = config.vocab_size if draft.kind == "sampled" else None
        state = BatchState(size.slots, draft.block_len, size.max_pages, proposal_vocab=vocab, device=META)
        kernels = replace(PLAIN, gathering=_no_copy if cuda else _Copying)
        self.stepper = DecodeStepRunner(self.model, draft, cache, state, kernels)

    def runs(self, mode: str, sampling: SamplingConfig) -> list[Callable[[], object]]:
        """The largest prefill, and the steps of a mode with and without rules."""
        plans, most = _plans(mode, self.block_len), self.block_len
        runs: list[Callable[[], object]] = [self.prefill]
        runs += [partial(self.step, plan, sampling) for plan in plans]
        runs.append(partial(self.step, max(plans, key=lambda plan: plan.query_tokens(most)), sampling, Tensor.clone))
        if sampling is SAMPLED:  # a beta below 1 brings a group for each pending token
            runs.append(partial(self.step, StepPlan(most, tuple(range(1, most + 1))), replace(sampling, beta=0.5)))
        return runs

    def step(
        self, plan: StepPlan, sampling: SamplingConfig, adjust: Callable[[Tensor], Tensor] | None = None
    ) -> object:
        """One decode step of the whole batch; on a CPU, its forward reads a chunk too."""
        state, beside = self.stepper.state, None if self.cuda else self.stepper.enter([self.chunk()])
        state.gather_sampling([sampling] * state.slots)
        copies, tensors = state.snapshot(), self.stepper.tensors_of(plan)  # copies as before a capture
        layers = self.model.config.layers
        outcome = self.stepper.step(state.slots, tensors, self.size.max_pages, adjust, beside, layers)
        return copies, outcome, [self.scores(hidden[0]) for hidden in (beside.hidden if beside else [])]

    def prefill(self) -> object:
        """The last chunk of the longest prompt, with every token scored."""
        (hidden,) = self.stepper.read(self.stepper.enter([self.chunk()]))
        return self.scores(hidden[0])

    def chunk(self) -> QueryTokens:
        """The last chunk of the longest prompt."""
        count = min(PREFILL_TOKENS, self.size.context_len - 1)
        pages = torch.zeros((1, self.size.max_pages), dtype=torch.long, device=META)
        tokens = torch.zeros((1, count), dtype=torch.long, device=META)
        return self.stepper.chunk(pages, self.size.context_len - count, tokens, StepPlan(count, (count,)))

    def scores(self, hidden_RE: Tensor) -> object:
        """Log-probabilities of the tokens of a chunk."""
        logprob = self.model.head(hidden_RE[: -self.block_len]).float().log_softmax(-1)
        return logprob.topk(min(MOST_TOP, logprob.shape[-1]), -1)


def _plans(mode: str, block_len: int) -> Sequence[StepPlan]:
    """The largest plans of a mode: by query tokens, and by query tokens that share one product with the head."""
    K = block_len
    if mode == "autoregressive" or K == 1:
        return [StepPlan(1)]
    whole = [StepPlan(1, (1,)), StepPlan(K), StepPlan(K, tuple(range(1, K + 1)))]
    if mode != AUTO:
        return {"two-pass": whole[:2], "single-pass": whole[2:]}[mode]
    together = [
        plan for plan in timed_plans(few_candidates(K)) if plan.query_tokens(K) <= DEFAULT_TUNING.one_product_tokens
    ]
    return [*whole, max(together, key=lambda plan: plan.query_tokens(K))]


def _no_copy(*_: object) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Attention that reads the cache in place."""
    return lambda q, k, v, pages: torch.empty_like(q)


class _Copying(reference.Gathering):
    """Attention that copies one layer's prefixes, as the reference kernel does."""

    def __call__(self, q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor, kv_pages: Tensor) -> Tensor:
        if self._bias_B1MK is None:
            share = q_BRHD.shape[2] // k_BRGD.shape[2]
            self._prepare(share if self._rows > 1 else 1, q_BRHD.dtype, kv_pages)
        return torch.empty_like(q_BRHD)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made in this context and still exist."""

    def __init__(self, device: torch.device, *, sort_bytes: int = 0) -> None:
        """device      whose tensors are counted
        sort_bytes  scratch bytes per element while a sort runs
        """
        super().__init__()
        self._device, self._sort_bytes, self.bytes, self._most = device, sort_bytes, 0, 0
        self._made: dict[int, weakref.ref[Any]] = {}

    def above(self, runs: Sequence[Callable[[], object]]) -> int:
        """Most bytes that any of `runs` adds to the bytes before it."""
        found = 0
        for run in runs:
            before = self._most = self.bytes
            run()
            found = max(found, self._most - before)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device == self._device]
        for tensor in made:
            self._count(tensor.untyped_storage())
        scratch = self._sort_bytes * made[0].numel() if func._schema.name == "aten::sort" else 0
        self._most = max(self._most, self.bytes + scratch)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._made:
            return

        def gone(_: object) -> None:
            del self._made[key]
            self.bytes -= size

        self._made[key] = weakref.ref(storage, gone)
        self.bytes += size
