"""FlexAttention under the rule of visibility, for long rows on an accelerator.

How does a long row attend without a square of scores?

The rule decides which tiles of 128 x 128 scores are empty, mixed or full. Empty tiles cost nothing, and full tiles need
no rule. Next-token rows and the doubled training row use the same form: their layouts differ, the rule does not. Equal
to DenseAttention up to rounding, forward and backward. The fused backward pass computes gradients of all keys, also of
clean keys that need none.

Shape letters: B sequences, L tokens, H heads, D head width, N tiles of a side.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tidar_core.transformer.layout import CLEAN, TokenLayout
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

    def __init__(self, layout: TokenLayout, *, split: bool = False, pairs_at_once: int = PAIRS_AT_ONCE) -> None:
        """split          whether clean tokens and masks come one after the other, instead of together
        pairs_at_once  pairs of tokens examined at once while tiles are classified
        """
        facts = layout.apply(Tensor.int)
        clean_len = int((layout.block[0] == CLEAN).sum()) if split else layout.block.shape[1]
        clean, masks = facts[:, :clean_len], facts[:, clean_len:]
        self.block_mask = _block_mask(clean, clean, pairs_at_once)
        """Tiles of all tokens; of clean tokens alone, if they come apart from masks."""
        self._mask_block_mask = _block_mask(masks, facts, pairs_at_once) if split else None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def suits(device: torch.device, row_len: int, head_size: int) -> bool:
        """Whether FlexAttention is the right form for rows of `row_len` tokens on this device."""
        return device.type == "cuda" and row_len >= TILE and head_size >= NARROWEST_HEAD

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        return _gathered(q_BLHD, k_BLHD, v_BLHD, self.block_mask)

    def clean(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Gathered values of clean tokens, as `SplitAttention` defines them."""
        self._kept[layer] = k_BSHD, v_BSHD
        return self(layer, q_BSHD, k_BSHD, v_BSHD)

    def masks(self, layer: int, q_BMHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Gathered values of masks, as `SplitAttention` defines them."""
        assert self._mask_block_mask is not None, "made for halves that come together"
        clean_k, clean_v = self._kept[layer]
        keys, values = torch.cat([clean_k, k_BMHD], 1), torch.cat([clean_v, v_BMHD], 1)
        return _gathered(q_BMHD, keys, values, self._mask_block_mask)


def _gathered(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, block_mask: BlockMask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    grouped = q.shape[1] != k.shape[1]
    inside = torch.compiler.is_compiling() or not q.is_cuda
    attention = flex_attention if inside else _compiled()
    return attention(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)


def _block_mask(query: TokenLayout, key: TokenLayout, pairs_at_once: int) -> BlockMask:
    mixed, full = _tiles(query, key, pairs_at_once)
    return BlockMask.from_kv_blocks(
        *_ordered(mixed),
        *_ordered(full),
        BLOCK_SIZE=TILE,
        mask_mod=flex_rule(query, key),
        seq_lengths=(query.position.shape[-1], key.position.shape[-1]),
    )


def _tiles(query: TokenLayout, key: TokenLayout, pairs_at_once: int) -> tuple[Tensor, Tensor]:
    """Mixed and full tiles [B, N, N]: some but not all pairs of a mixed tile see each other; in a full tile all do."""
    lengths = query.position.shape[-1], key.position.shape[-1]
    queries, keys = (-(-length // TILE) for length in lengths)
    beyond = queries * TILE - lengths[0], keys * TILE - lengths[1]
    some, every = [], []
    for rows in torch.arange(len(query.position)).split(max(1, pairs_at_once // (lengths[0] * lengths[1]))):
        visible = dense_visibility(*(part[rows[0] : rows[-1] + 1] for part in (query, key)))
        visible = F.pad(visible, (0, beyond[1], 0, beyond[0])).view(-1, queries, TILE, keys, TILE)
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
def _compiled():  # pyrefly: ignore[unannotated-return]
    return torch.compile(flex_attention, dynamic=False)
