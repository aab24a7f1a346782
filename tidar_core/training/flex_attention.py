"""How does a long row attend on an accelerator without a square of scores?

FlexAttention under the one rule: the rule itself says which tiles of 128 x 128 scores are empty, mixed or full, so that
empty ones cost nothing and full ones need no rule. One form for next-token rows and for the doubled training row, as
the layout differs and the rule does not. Equal to DenseAttention up to rounding, forward and backward.

Shape letters: B sequences, L tokens, H heads, D head width, N tiles of a side.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tidar_core.transformer.layout import TokenLayout
from tidar_core.transformer.visibility import dense_visibility, flex_rule

__all__ = ["FlexAttention"]

TILE = 128
"""Side of a tile of scores: FlexAttention's own default, a multiple of every kernel tile that it tunes."""
PAIRS_AT_ONCE = 2**28
"""Pairs of tokens looked at together while tiles are judged: a byte each, for a moment."""
NARROWEST_HEAD = 16
"""The least that the tensor cores multiply along."""


class FlexAttention:
    """Every row against the tiles that it can see. Compiled on its own unless the caller is."""

    def __init__(self, layout: TokenLayout) -> None:
        facts = layout.apply(Tensor.int)
        row_len = facts.position.shape[-1]
        mixed, full = _tiles(facts)
        self.block_mask = BlockMask.from_kv_blocks(
            *_ordered(mixed),
            *_ordered(full),
            BLOCK_SIZE=TILE,
            mask_mod=flex_rule(facts, facts),
            seq_lengths=(row_len, row_len),
        )

    @staticmethod
    def suits(device: torch.device, row_len: int, head_size: int) -> bool:
        """Whether this is the form for rows of so many tokens on this device."""
        return device.type == "cuda" and row_len >= TILE and head_size >= NARROWEST_HEAD

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        grouped = q.shape[1] != k.shape[1]
        inside = torch.compiler.is_compiling() or not q.is_cuda
        attention = flex_attention if inside else _compiled()
        return attention(q, k, v, block_mask=self.block_mask, enable_gqa=grouped).transpose(1, 2)


def _tiles(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """[B, N, N] twice: where some but not all pairs of a tile see each other, and where all do."""
    row_len = layout.position.shape[-1]
    tiles = -(-row_len // TILE)
    beyond = tiles * TILE - row_len
    some, every = [], []
    for rows in torch.arange(len(layout.position)).split(max(1, PAIRS_AT_ONCE // row_len**2)):
        part = layout[rows[0] : rows[-1] + 1]
        visible = F.pad(dense_visibility(part, part), (0, beyond, 0, beyond))
        visible = visible.view(-1, tiles, TILE, tiles, TILE)
        some.append(visible.any(-1).any(-2))
        every.append(visible.all(-1).all(-2))
    full = torch.cat(every)
    return torch.cat(some) & ~full, full


def _ordered(tiles_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of tiles how many are set [B, 1, N], and their columns first in order [B, 1, N, N]."""
    tiles = tiles_BNN[:, None]
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), columns.int()


@cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)
