"""FlexAttention under the rule of visibility, for long rows on an accelerator.

How does a long row attend without a square of scores?

The rule decides which tiles of 128 x 128 scores are empty, mixed or full. Empty tiles cost nothing, and full tiles need
no rule. Next-token rows and the doubled training row use the same form: their layouts differ, the rule does not. Equal
to DenseAttention up to rounding, forward and backward.

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
"""Pairs of tokens examined at once while tiles are classified; each takes a byte for that time."""
NARROWEST_HEAD = 16
"""Smallest head width that tensor cores multiply."""


class FlexAttention:
    """Attention of every token to the tiles that it can see. Compiled on its own unless the caller is compiled."""

    def __init__(self, layout: TokenLayout, *, pairs_at_once: int = PAIRS_AT_ONCE) -> None:
        """pairs_at_once  pairs of tokens examined at once while tiles are classified"""
        facts = layout.apply(Tensor.int)
        row_len = facts.position.shape[-1]
        mixed, full = _tiles(facts, pairs_at_once)
        self.block_mask = BlockMask.from_kv_blocks(
            *_ordered(mixed),
            *_ordered(full),
            BLOCK_SIZE=TILE,
            mask_mod=flex_rule(facts, facts),
            seq_lengths=(row_len, row_len),
        )

    @staticmethod
    def suits(device: torch.device, row_len: int, head_size: int) -> bool:
        """Whether FlexAttention is the right form for rows of `row_len` tokens on this device."""
        return device.type == "cuda" and row_len >= TILE and head_size >= NARROWEST_HEAD

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        grouped = q.shape[1] != k.shape[1]
        inside = torch.compiler.is_compiling() or not q.is_cuda
        attention = flex_attention if inside else _compiled()
        return attention(q, k, v, block_mask=self.block_mask, enable_gqa=grouped).transpose(1, 2)


def _tiles(layout: TokenLayout, pairs_at_once: int) -> tuple[Tensor, Tensor]:
    """Mixed and full tiles [B, N, N]: some but not all pairs of a mixed tile see each other; in a full tile all do."""
    row_len = layout.position.shape[-1]
    tiles = -(-row_len // TILE)
    beyond = tiles * TILE - row_len
    some, every = [], []
    for rows in torch.arange(len(layout.position)).split(max(1, pairs_at_once // row_len**2)):
        part = layout[rows[0] : rows[-1] + 1]
        visible = F.pad(dense_visibility(part, part), (0, beyond, 0, beyond))
        visible = visible.view(-1, tiles, TILE, tiles, TILE)
        some.append(visible.any(-1).any(-2))
        every.append(visible.all(-1).all(-2))
    full = torch.cat(every)
    return torch.cat(some) & ~full, full


def _ordered(tiles_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Number of set tiles in each line of tiles [B, 1, N], and their columns first, in order [B, 1, N, N]."""
    tiles = tiles_BNN[:, None]
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), columns.int()


@cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)
