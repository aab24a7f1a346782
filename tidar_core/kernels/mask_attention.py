"""Attention of mask tokens in training in C, where clean keys and values need no gradient.

How do the masks of a frozen checkpoint gather values without a matrix of scores?

A mask sees a run of clean keys and masks of its own block. The scores are computed in the forward pass and again in the
backward pass, and never kept. `tidar_core.transformer.attention` has the plain form.

Shape letters: B rows, S clean tokens of a row, M masks of a row, H heads, G key heads, D head width, P parts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_core.kernels import on_cpu
from tidar_core.kernels.compiled import library, needed_library

__all__ = ["MaskRuns", "mask_attention", "suits"]

LANES = 16
"""Divisor of a head's width."""


@dataclass(frozen=True, slots=True)
class MaskRuns:
    """Keys that each mask sees, as runs."""

    seen_BM4: Tensor
    """First clean key and their number, first mask and their number; int32."""
    parts_P3: Tensor
    """Row, first mask and number of masks that follow each other and see the same clean keys; int32."""

    @staticmethod
    def of(visible_BMK: Tensor, clean_len: int, real_BM: Tensor) -> "MaskRuns | None":
        """The runs of masks that see clean keys, then masks; None where what a mask sees is no run.

        real_BM  masks that are no padding; the results of the others are 0
        """
        clean, own = (_runs(part) for part in visible_BMK.split([clean_len, visible_BMK.shape[2] - clean_len], 2))
        if clean is None or own is None:
            return None
        seen_BM4, number_M = torch.stack([*clean, *own], -1), torch.arange(real_BM.shape[1])
        if not bool(real_BM.any()):
            return MaskRuns(seen_BM4.int().contiguous(), torch.zeros(0, 3, dtype=torch.int32))
        same_BM = (seen_BM4[:, 1:, :2] == seen_BM4[:, :-1, :2]).all(-1) & real_BM[:, 1:] & real_BM[:, :-1]
        reached_BM = (seen_BM4[..., 2] + seen_BM4[..., 3]).cummax(1).values
        begins_BM = real_BM.clone()
        apart_BM = (reached_BM[:, :-1] <= number_M[1:]) & (seen_BM4[:, 1:, 2] >= number_M[1:])  # another block
        begins_BM[:, 1:] &= ~same_BM | apart_BM
        row_P, first_P = begins_BM.nonzero(as_tuple=True)
        part_BM = begins_BM.flatten().cumsum(0).view_as(begins_BM) - 1
        count_P = torch.bincount(part_BM[real_BM], minlength=len(first_P))
        first_BM = first_P[part_BM.clamp(min=0)]
        inside_BM = (seen_BM4[..., 2] >= first_BM) & (reached_BM <= first_BM + count_P[part_BM.clamp(min=0)])
        if not bool((inside_BM | ~real_BM).all()):
            return None
        parts_P3 = torch.stack([row_P, first_P, count_P], 1)
        return MaskRuns(seen_BM4.int().contiguous(), parts_P3.int().contiguous())


def suits(q: Tensor, clean_k: Tensor, clean_v: Tensor) -> bool:
    """Whether the kernel takes such queries, keys and values here: in training on a CPU that has C kernels."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.dtype not in on_cpu.DTYPES or q.shape[-1] % LANES:
        return False
    return not (clean_k.requires_grad or clean_v.requires_grad) and library() is not None


def mask_attention(
    q_BMHD: Tensor, k_BMGD: Tensor, v_BMGD: Tensor, clean_k_BSGD: Tensor, clean_v_BSGD: Tensor, runs: MaskRuns
) -> Tensor:
    """Values [B, M, H, D] that masks gather; no gradient reaches clean keys and values."""
    return _MaskAttention.apply(q_BMHD, k_BMGD, v_BMGD, clean_k_BSGD, clean_v_BSGD, runs)


class _MaskAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, clean_k: Tensor, clean_v: Tensor, runs: MaskRuns) -> Tensor:
        inputs = [_even(x) for x in (q, k, v, clean_k, clean_v)]
        out, logs = torch.zeros(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])
        needed_library().mask_attention(*_arguments(inputs, runs), out.data_ptr(), logs.data_ptr())
        ctx.save_for_backward(*inputs, out, logs)
        ctx.runs = runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        *inputs, out, logs = ctx.saved_tensors
        grad, found = grad.contiguous(), [torch.zeros(x.shape, dtype=x.dtype) for x in inputs[:3]]
        needed_library().mask_attention_gradient(
            *_arguments(inputs, ctx.runs), out.data_ptr(), logs.data_ptr(), grad.data_ptr(),
            *(x.data_ptr() for x in found),
        )  # fmt: skip
        return *found, None, None, None


def _arguments(inputs: list[Tensor], runs: MaskRuns) -> tuple[int, ...]:
    q, k, clean = inputs[0], inputs[1], inputs[3]
    return (
        *(x.data_ptr() for x in inputs), *(x.stride(1) for x in inputs), runs.seen_BM4.data_ptr(),
        runs.parts_P3.data_ptr(), len(runs.parts_P3), q.shape[1], clean.shape[1], q.shape[2], k.shape[2], q.shape[3],
        q.dtype == on_cpu.HALF,
    )  # fmt: skip


def _even(x_BLHD: Tensor) -> Tensor:
    """The tensor, copied if its tokens do not lie at one distance from each other in all rows."""
    B, L, _, D = x_BLHD.shape
    tight = x_BLHD.stride()[2:] == (D, 1) and (B == 1 or x_BLHD.stride(0) == L * x_BLHD.stride(1))
    return x_BLHD if tight else x_BLHD.contiguous()


def _runs(visible_BMK: Tensor) -> tuple[Tensor, Tensor] | None:
    """First key and number of keys [B, M] that each mask sees; None where they are no run."""
    count, first = visible_BMK.sum(-1), visible_BMK.byte().argmax(-1)
    last = visible_BMK.shape[-1] - 1 - visible_BMK.byte().flip(-1).argmax(-1)
    return (first, count) if bool(((count == 0) | (last - first + 1 == count)).all()) else None
