"""Attention under a visibility, for training and for reference.

How do query tokens gather values under a visibility?

`DenseAttention` is the plain form and the oracle. `PiecewiseAttention` gives the same numbers without computing the
whole square of scores. It takes query tokens in chunks, each against the run of clean tokens and the run of masks that
any token of the chunk sees. On a CPU, masks of a frozen checkpoint go through a kernel in C instead. Next-token rows
and the doubled training row use the same form: their layouts differ, the rule does not.

Shape letters: B sequences, L tokens, S clean tokens of a row, H heads, G key heads, R query heads of a key head,
D head width, P query tokens of a chunk, W keys that they may see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.kernels.mask_attention import MaskRuns, mask_attention, suits
from tidar_core.transformer.layout import CLEAN, LENGTH_STEP, PADDING, TokenLayout
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["Attention", "DenseAttention", "PiecewiseAttention", "SplitAttention", "attend"]

CLEAN_CHUNK = 256
"""Clean tokens of a chunk. The fused kernel takes them: it keeps no scores, and gains little from shorter chunks."""
MASK_CHUNK = 64
"""Mask tokens of a chunk. Plain products take them: on a CPU the fused kernel is slower, in bf16 by a factor of two.
Plain products keep their scores for the backward pass."""


Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Function that a transformer layer calls to gather the values of its tokens.

It takes the number of the layer, queries [B, L, H, D], keys and values; it returns gathered values [B, L, H, D].
Keys and values may have fewer heads than queries, each serving a run of query heads.
"""


class SplitAttention(Protocol):
    """Attention whose clean tokens and mask tokens come one after the other, layer by layer.

    `clean` and `masks` are an `Attention` each, for the S clean tokens and for the M masks behind them. A call takes
    all tokens at once.
    """

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        """Gathered values [B, L, H, D] of all tokens, as `Attention` defines them."""
        ...

    def clean(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Gathered values [B, S, H, D] of clean tokens. Their keys and values are kept for `masks`."""
        ...

    def masks(self, layer: int, q_BMHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Gathered values [B, M, H, D] of masks, which also see clean tokens of the same layer."""
        ...


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, visible_BQK: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, D]; every query must see at least one key."""
    grouped = q_BHQD.shape[1] != k_BHKD.shape[1]
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=visible_BQK[:, None], enable_gqa=grouped)


class DenseAttention:
    """Attention of every token to every token, under the rule of visibility."""

    def __init__(self, layout: TokenLayout) -> None:
        self.visible_BLL = dense_visibility(layout, layout)
        self._clean: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        return attend(q, k, v, self.visible_BLL[:, -q.shape[2] :, : k.shape[2]]).transpose(1, 2)

    def clean(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Gathered values of clean tokens, as `SplitAttention` defines them."""
        S, self._clean[layer] = q_BSHD.shape[1], (k_BSHD, v_BSHD)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        return attend(q, k, v, self.visible_BLL[:, :S, :S]).transpose(1, 2)

    def masks(self, layer: int, q_BMHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Gathered values of masks, as `SplitAttention` defines them."""
        clean_k, clean_v = self._clean[layer]
        return self(layer, q_BMHD, torch.cat([clean_k, k_BMHD], 1), torch.cat([clean_v, v_BMHD], 1))


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
        clean, masks = facts[:, :S], facts[:, S:]
        self._clean_len, self._mask_chunk = S, mask_chunk
        self._clean = [_Chunk.of(clean[:, queries], queries, (clean,)) for queries in _cut(S, clean_chunk)]
        self._halves, self._mask_len, self._dtype = (clean, masks), L - S, dtype
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        S = self._clean_len
        gathered = [self.clean(layer, q_BLHD[:, :S], k_BLHD[:, :S], v_BLHD[:, :S])]
        if self._mask_len:
            gathered.append(self.masks(layer, q_BLHD[:, S:], k_BLHD[:, S:], v_BLHD[:, S:]))
        del self._kept[layer]
        return torch.cat(gathered, 1)

    def clean(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Gathered values of clean tokens, as `SplitAttention` defines them."""
        self._kept[layer] = k_BSHD, v_BSHD
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        gathered = []
        for chunk in self._clean:
            (run,) = chunk.runs
            gathered.append(attend(q[:, :, chunk.queries], run.of((k,)), run.of((v,)), chunk.visible_BPW))
        return torch.cat(gathered, 2).transpose(1, 2)

    def masks(self, layer: int, q_BMHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Gathered values of masks, as `SplitAttention` defines them."""
        clean_k, clean_v = self._kept[layer]
        if suits(q_BMHD, clean_k, clean_v) and self._runs is not None:
            return mask_attention(q_BMHD, k_BMHD, v_BMHD, clean_k, clean_v, self._runs)
        q, *halves = (x.transpose(1, 2) for x in (q_BMHD, clean_k, k_BMHD, clean_v, v_BMHD))
        k, v = halves[:2], halves[2:]
        q = q.unflatten(1, (k[0].shape[1], -1)) * q.shape[-1] ** -0.5
        gathered = [
            _attend(part, [r.of(k) for r in chunk.runs], [r.of(v) for r in chunk.runs], bias_BPW)
            for part, (chunk, bias_BPW) in zip(q.split(self._mask_chunk, 3), self._pieces, strict=True)
        ]
        return torch.cat(gathered, 2).transpose(1, 2)

    @cached_property
    def _pieces(self) -> "list[tuple[_Chunk, Tensor]]":
        """Chunks of masks, with what hides keys from them."""
        masks = self._halves[1]
        chunks = [
            _Chunk.of(masks[:, queries], queries, self._halves) for queries in _cut(self._mask_len, self._mask_chunk)
        ]
        return [
            (x, torch.zeros_like(x.visible_BPW, dtype=self._dtype).masked_fill_(~x.visible_BPW, float("-inf")))
            for x in chunks
        ]

    @cached_property
    def _runs(self) -> MaskRuns | None:
        clean, masks = self._halves
        return MaskRuns.of(dense_visibility(masks, clean.then(masks)), self._clean_len, masks.document != PADDING)


def _attend(q_BGRPD: Tensor, k_BGWD: Sequence[Tensor], v_BGWD: Sequence[Tensor], bias_BPW: Tensor) -> Tensor:
    """Softmax attention [B, H, P, D] by plain products; q is scaled already.

    Keys and values come in runs. A run that needs no gradient costs none.
    """
    grid = q_BGRPD.shape[2:4]
    q = q_BGRPD.flatten(2, 3)
    score_BGRPW = torch.cat([q @ k.transpose(-1, -2) for k in k_BGWD], -1).unflatten(2, grid)
    weight = torch.softmax(score_BGRPW + bias_BPW[:, None, None], -1).flatten(2, 3)
    runs = weight.split([v.shape[2] for v in v_BGWD], -1)
    gathered = sum(w @ v for w, v in zip(runs[1:], v_BGWD[1:], strict=True))
    return (runs[0] @ v_BGWD[0] + gathered).unflatten(2, grid).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of keys in one half of the tokens."""

    half: int
    keys: slice

    def of(self, halves: Sequence[Tensor]) -> Tensor:
        """Keys or values [B, G, W, D] of the run; `halves` are those of clean tokens and of masks."""
        return halves[self.half][:, :, self.keys]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Query tokens of one half, and the runs of keys that any of them sees."""

    queries: slice
    runs: tuple[_Run, ...]
    visible_BPW: Tensor

    @staticmethod
    def of(query: TokenLayout, queries: slice, halves: tuple[TokenLayout, ...]) -> "_Chunk":
        """The chunk of `queries`; its run in each half holds all keys that are seen, with lengths that recur."""
        runs, visible = [], []
        for half, keys in enumerate(halves):
            square_BPW = dense_visibility(query, keys)
            seen = square_BPW.flatten(0, 1).any(0).nonzero()[:, 0]
            if len(seen):
                first, after = int(seen[0]) // LENGTH_STEP, int(seen[-1]) // LENGTH_STEP + 1
                run = slice(first * LENGTH_STEP, min(after * LENGTH_STEP, square_BPW.shape[-1]))
                runs.append(_Run(half, run))
                visible.append(square_BPW[..., run])
        return _Chunk(queries, tuple(runs), torch.cat(visible, -1))


def _cut(length: int, longest: int) -> list[slice]:
    """[0, length) in slices of `longest`; the last may be shorter."""
    return [slice(first, min(first + longest, length)) for first in range(0, length, longest)]
