"""Sequence parallelism: several workers share one row.

Each worker holds a run of tokens of both halves, and computes there everything that is done token by token. For
attention the workers exchange data: each gets all tokens for some of the heads (all-to-all; Ulysses, arXiv 2309.14509).
So visibility is computed on whole rows, as on one worker. Loss sums add up over workers, and so do gradients.

Shape letters: B rows, S tokens of a row, M tokens of its mask half, L = S + M, l tokens of this worker, W workers,
H heads, h heads of a worker, D head width, E embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar_core.errors import ConfigError
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.transformer.attention import Attention, SplitAttention

__all__ = ["ExchangedAttention", "SequenceParallel", "activation_bytes", "require_equal_heads", "require_equal_runs"]


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """Group of workers that share rows, and the rank of this worker in it."""

    group: Any
    """Process group; `None`: all workers."""
    workers: int
    rank: int
    """Rank of this worker within the group."""

    @staticmethod
    def among_neighbours(workers: int) -> "SequenceParallel":
        """Group of this worker: workers 0 .. n-1 share rows, workers n .. 2n-1 share others, and so on.

        Every worker must call it.
        """
        world = dist.get_world_size()
        groups = [dist.new_group(list(range(first, first + workers))) for first in range(0, world, workers)]
        return SequenceParallel(groups[dist.get_rank() // workers], workers, dist.get_rank() % workers)

    def part(self, batch: TrainBatch) -> TrainBatch:
        """This worker's tokens and labels of whole rows. Raises ConfigError if the rows cannot be cut equally."""
        S, W = batch.ar_target_BS.shape[1], self.workers
        M = batch.token_BL.shape[1] - S
        require_equal_runs(W, S, M)
        clean, masks = (slice(n // W * self.rank, n // W * (self.rank + 1)) for n in (S, M))

        def both(x: Tensor) -> Tensor:
            return torch.cat([x[:, :S][:, clean], x[:, S:][:, masks]], 1)

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, masks]

        return replace(
            batch,
            token_BL=both(batch.token_BL),
            layout=batch.layout.apply(both),
            ar_target_BS=batch.ar_target_BS[:, clean],
            diffusion_target_BM=some(batch.diffusion_target_BM),
            diffusion_weight_BM=some(batch.diffusion_weight_BM),
            diffusion_total=None if batch.diffusion_total is None else batch.diffusion_total / W,
            before_BM=some(batch.before_BM),
            teacher_BM=some(batch.teacher_BM),
            whole=batch.layout,
            first_mask=masks.start,
        )

    def attention(self, whole: SplitAttention, clean_len: int) -> "ExchangedAttention":
        """Attention for this worker's tokens.

        whole      attention of whole rows
        clean_len  clean tokens of this worker
        """
        return ExchangedAttention(self, whole, clean_len)

    def gathered(self, x_Bl: Tensor) -> Tensor:
        """Facts [B, S or M, ..] of one half of whole rows, from this worker's part of it; without gradients."""
        parts = [torch.empty_like(x_Bl) for _ in range(self.workers)]
        dist.all_gather(parts, x_Bl.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def by_heads(self, x_BlHD: Tensor, clean_len: int) -> Tensor:
        """All tokens of this worker's heads [B, L, h, D]."""
        exchanged_WBlhD = _Exchange.apply(x_BlHD.unflatten(2, (self.workers, -1)).permute(2, 0, 1, 3, 4), self.group)
        halves = exchanged_WBlhD.transpose(0, 1).tensor_split([clean_len], 2)
        return torch.cat([half.flatten(1, 2) for half in halves], 1)

    def by_tokens(self, x_BLhD: Tensor, clean_len: int) -> Tensor:
        """All heads of this worker's tokens [B, l, H, D]."""
        halves = x_BLhD.tensor_split([clean_len * self.workers], 1)
        ours_BWlhD = torch.cat([half.unflatten(1, (self.workers, -1)) for half in halves], 2)
        exchanged_WBlhD = _Exchange.apply(ours_BWlhD.transpose(0, 1), self.group)
        return exchanged_WBlhD.permute(1, 2, 0, 3, 4).flatten(2, 3)


@contextmanager
def activation_bytes(module: nn.Module) -> Iterator[list[int]]:
    """Measure the bytes that forwards in this context keep for their backward pass, weights excluded.

    The list holds the number when the context ends.
    """
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    held: list[int] = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield held
    held.append(sum(kept.values()))


def require_equal_runs(workers: int, row_len: int, mask_len: int) -> None:
    """Raise ConfigError if the workers cannot hold equal runs of both halves of a row."""
    if row_len % workers or mask_len % workers:
        raise ConfigError(
            f"sequence_parallel is {workers}; it must divide the {row_len} tokens of a row and the {mask_len} of its "
            "mask half"
        )


def require_equal_heads(workers: int, heads: int) -> None:
    """Raise ConfigError if the heads cannot be divided equally among the workers."""
    if heads % workers:
        raise ConfigError(f"sequence_parallel is {workers}; it must divide the model's {heads} heads")


class ExchangedAttention:
    """Attention over whole rows, for a worker that holds some of their tokens."""

    def __init__(self, workers: SequenceParallel, whole: SplitAttention, clean_len: int) -> None:
        self._workers, self._whole, self._clean_len = workers, whole, clean_len

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        return self._exchanged(self._whole, self._clean_len, layer, q_BLHD, k_BLHD, v_BLHD)

    def clean(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Gathered values of clean tokens, as `SplitAttention` defines them."""
        return self._exchanged(self._whole.clean, q_BSHD.shape[1], layer, q_BSHD, k_BSHD, v_BSHD)

    def masks(self, layer: int, q_BMHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Gathered values of masks, as `SplitAttention` defines them."""
        return self._exchanged(self._whole.masks, 0, layer, q_BMHD, k_BMHD, v_BMHD)

    def _exchanged(
        self, whole: Attention, clean_len: int, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor
    ) -> Tensor:
        """Gathered values of this worker's tokens, the first `clean_len` of which are clean."""
        heads, kv_heads, W = q_BLHD.shape[2], k_BLHD.shape[2], self._workers.workers
        require_equal_heads(W, heads)
        if kv_heads % W:
            k_BLHD, v_BLHD = (x.repeat_interleave(heads // kv_heads, 2) for x in (k_BLHD, v_BLHD))
        q, k, v = (self._workers.by_heads(x, clean_len) for x in (q_BLHD, k_BLHD, v_BLHD))
        return self._workers.by_tokens(whole(layer, q, k, v), clean_len)


class _Exchange(torch.autograd.Function):
    """All-to-all exchange: slice w goes to worker w, and its gradient returns in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return _exchanged(gradient, ctx.group), None


def _exchanged(x: Tensor, group: Any) -> Tensor:
    received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received
