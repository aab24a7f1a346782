"""Attention under a visibility, for training and for reference.

How do query tokens gather values under a visibility?

`DenseAttention` is the plain form and the oracle. `PiecewiseAttention` gives the same numbers without computing the
whole square of scores. It takes query tokens in chunks, each against the run of clean tokens and the run of masks that
any token of the chunk sees. Next-token rows and the doubled training row use the same form: their layouts differ, the
rule does not.

Shape letters: B sequences, L tokens, S clean tokens of a row, H heads, G key heads, R query heads of a key head,
D head width, P query tokens of a chunk, W keys that they may see.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.transformer.layout import CLEAN, TokenLayout
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["Attention", "DenseAttention", "PiecewiseAttention", "attend"]

CLEAN_CHUNK = 256
"""Clean tokens of a chunk. The fused kernel takes them: it keeps no scores, and gains little from shorter chunks."""
MASK_CHUNK = 64
"""Mask tokens of a chunk. Plain products take them: on a CPU the fused kernel is slower, in bf16 by a factor of two.
Plain products keep their scores for the backward pass."""


class Attention(Protocol):
    """Interface that a transformer layer calls to gather the values of its tokens."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        """Gathered values [B, L, H, D] of layer number `layer`.

        k and v may have fewer heads than q, each serving a run of query heads.
        """
        ...


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, visible_BQK: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, D]; every query must see at least one key."""
    grouped = q_BHQD.shape[1] != k_BHKD.shape[1]
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=visible_BQK[:, None], enable_gqa=grouped)


class DenseAttention:
    """Attention of every token to every token, under the rule of visibility."""

    def __init__(self, layout: TokenLayout) -> None:
        self.visible_BLL = dense_visibility(layout, layout)

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        return attend(q, k, v, self.visible_BLL).transpose(1, 2)


class PiecewiseAttention:
    """Attention in chunks. Equal to DenseAttention up to rounding, forward and backward."""

    def __init__(
        self,
        layout: TokenLayout,
        dtype: torch.dtype = torch.float32,
        *,
        clean_chunk: int = CLEAN_CHUNK,
        mask_chunk: int = MASK_CHUNK,
    ) -> None:
        """layout       clean tokens, then masks if there are any, block after block
        dtype        of the attention scores
        clean_chunk  clean tokens of a chunk
        mask_chunk   mask tokens of a chunk
        """
        facts = layout.apply(Tensor.int)
        S, L = int((facts.block[0] == CLEAN).sum()), facts.position.shape[-1]
        self._clean = [_Chunk.of(facts, queries, (slice(0, S),)) for queries in _cut(0, S, clean_chunk)]
        self._masks = [_Chunk.of(facts, queries, (slice(0, S), slice(S, L))) for queries in _cut(S, L, mask_chunk)]
        self._bias = [torch.zeros_like(p.visible_BPW, dtype=dtype).masked_fill_(~p.visible_BPW, float("-inf"))
                      for p in self._masks]  # fmt: skip

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        gathered = [
            attend(q[:, :, chunk.queries], chunk.seen(k), chunk.seen(v), chunk.visible_BPW) for chunk in self._clean
        ]
        if self._masks:
            q = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
        for chunk, bias_BPW in zip(self._masks, self._bias):
            gathered.append(_attend(q[:, :, :, chunk.queries], chunk.seen(k), chunk.seen(v), bias_BPW))
        return torch.cat(gathered, 2).transpose(1, 2)


def _attend(q_BGRPD: Tensor, k_BGWD: Tensor, v_BGWD: Tensor, bias_BPW: Tensor) -> Tensor:
    """Softmax attention [B, H, P, D] by plain products; q is scaled already."""
    grid = q_BGRPD.shape[2:4]
    score_BGRPW = (q_BGRPD.flatten(2, 3) @ k_BGWD.transpose(-1, -2)).unflatten(2, grid)
    weight_BGRPW = torch.softmax(score_BGRPW + bias_BPW[:, None, None], -1)
    return (weight_BGRPW.flatten(2, 3) @ v_BGWD).unflatten(2, grid).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Query tokens, and the runs of keys that any of them sees."""

    queries: slice
    runs: tuple[slice, ...]
    visible_BPW: Tensor

    @staticmethod
    def of(layout: TokenLayout, queries: slice, halves: tuple[slice, ...]) -> "_Chunk":
        """The chunk of `queries`; its run in each half is from the first to the last key that is seen."""
        runs, visible = [], []
        for half in halves:
            square_BPW = dense_visibility(layout[:, queries], layout[:, half])
            seen = square_BPW.flatten(0, 1).any(0).nonzero()[:, 0]
            if len(seen):
                first, last = int(seen[0]), int(seen[-1])
                runs.append(slice(half.start + first, half.start + last + 1))
                visible.append(square_BPW[..., first : last + 1])
        return _Chunk(queries, tuple(runs), torch.cat(visible, -1))

    def seen(self, x_BGLD: Tensor) -> Tensor:
        """Keys or values [B, G, W, D] of the runs."""
        runs = [x_BGLD[:, :, run] for run in self.runs]
        return torch.cat(runs, 2) if len(runs) > 1 else runs[0]


def _cut(start: int, stop: int, longest: int) -> list[slice]:
    """[start, stop) in the fewest slices of at most `longest`, as even as possible."""
    count = -(-(stop - start) // longest)
    edges = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]
