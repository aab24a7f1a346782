"""Layout of tokens: document, position, horizon, block and reach of each.

Training, prefill and decoding are three layouts of the same five facts; `visibility` derives from them which token sees
which.

Shape letters: B sequences, S clean tokens of a packed row, L tokens of any layout, C clean tokens of a decode step,
G groups, K block length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CLEAN", "LENGTH_STEP", "PADDING", "WHOLE_BLOCK", "TokenLayout", "causal_layout", "decode_layout", "decode_rows",
    "training_layout",
]  # fmt: skip

CLEAN = -1
"""Block of a token whose identity is known."""
LENGTH_STEP = 32
"""Lengths that follow the content of a batch are rounded up to a multiple of this number, so that few lengths occur.
On a CPU, torch prepares a product anew for each shape that it has not met, which takes longer than many products."""
WHOLE_BLOCK = 2**30
"""Reach of a mask token that sees all of its block."""
PADDING = -1
"""Document of a padding token. Padding sees only padding, and is seen only by padding."""


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Five facts about each token; integer tensors of one shape, usually [B, L]."""

    document: Tensor
    """Ordinal of the document; PADDING for none."""
    position: Tensor
    """Position in the document, from 0: the rotary phase."""
    horizon: Tensor
    """Last clean position of its document that the token may see."""
    block: Tensor
    """CLEAN, or the number of the block that a mask token belongs to."""
    reach: Tensor
    """Last position of its own block that a mask token may see: its own, or WHOLE_BLOCK; of a clean token, its own."""

    def __getitem__(self, index: Any) -> "TokenLayout":
        """The same facts for some of the tokens, or with axes added."""
        return self.apply(lambda fact: fact[index])

    def apply(self, rearrange: Callable[[Tensor], Tensor]) -> "TokenLayout":
        """The same facts, each tensor passed through `rearrange`."""
        facts = (self.document, self.position, self.horizon, self.block, self.reach)
        return TokenLayout(*(rearrange(fact) for fact in facts))

    @property
    def offset(self) -> Tensor:
        """Index of each mask token in its block, from 0; without meaning for clean tokens."""
        return self.position - self.horizon - 1

    def then(self, other: "TokenLayout") -> "TokenLayout":
        """These tokens, followed along the last axis by the tokens of `other`."""
        return TokenLayout(
            torch.cat([self.document, other.document], -1),
            torch.cat([self.position, other.position], -1),
            torch.cat([self.horizon, other.horizon], -1),
            torch.cat([self.block, other.block], -1),
            torch.cat([self.reach, other.reach], -1),
        )


def causal_layout(document_BS: Tensor) -> TokenLayout:
    """Packed rows of clean tokens, each of which sees its own document up to itself.

    document_BS  documents in order of appearance; equal neighbours belong together, PADDING at the end
    """
    index_S = torch.arange(document_BS.shape[-1], device=document_BS.device)
    starts_BS = torch.ones_like(document_BS, dtype=torch.bool)
    starts_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    start_BS = torch.where(starts_BS, index_S, 0).cummax(-1).values
    position_BS = index_S - start_BS
    return TokenLayout(document_BS, position_BS, position_BS, torch.full_like(position_BS, CLEAN), position_BS)


def training_layout(
    document_BS: Tensor, block_len: int | Tensor, phase: int | Tensor = 0, *, causal_masks: bool = False
) -> TokenLayout:
    """The doubled row: S clean tokens, then S mask tokens at the same positions (TiDAR, section 3.1).

    block_len  block length of all rows, or of each row [B, 1]
    phase      tokens that the first block of each document lacks, 0..block_len - 1: of all rows, or of each row [B, 1]
    causal_masks  a mask token sees no later mask token

    Blocks are cut per document, from its first token in the row; each mask token sees clean tokens before its block.
    """
    clean = causal_layout(document_BS)
    block_BS = (clean.position + phase) // block_len
    start_BS = (block_BS * block_len - phase).clamp(min=0)
    masks = TokenLayout(clean.document, clean.position, start_BS - 1, block_BS, _reach(clean.position, causal_masks))
    return clean.then(masks)


def decode_layout(
    prefix_len_B: Tensor, clean_len: int, groups: Sequence[int], block_len: int, *, causal_masks: bool = False
) -> TokenLayout:
    """Query tokens of one decoder forward: `clean_len` clean tokens after the prefix, then a block of masks per group.

    Group g holds `block_len` masks at positions P+g .. P+g+K-1, which see the prefix and the first g clean tokens. With
    `causal_masks`, none sees a later mask.
    Every forward of the decoder has one of these forms:

    prefill         clean tokens of the prompt; groups = (clean_len,) in the last chunk, () before
    single-pass     K drafts, groups = (1, .., K)
    autoregressive  one token, no groups
    """
    row = decode_rows(clean_len, tuple(groups), block_len, prefix_len_B.device, causal_masks=causal_masks)
    prefix_B1 = prefix_len_B[:, None]
    shape = (len(prefix_len_B), -1)
    return TokenLayout(
        row.document.expand(shape), prefix_B1 + row.position, prefix_B1 + row.horizon, row.block.expand(shape),
        prefix_B1 + row.reach,
    )  # fmt: skip


def decode_rows(
    clean_len: int, groups: tuple[int, ...], block_len: int, device: torch.device, *, causal_masks: bool = False
) -> TokenLayout:
    """`decode_layout` of one sequence with an empty prefix [R], for R query tokens."""
    clean_C = torch.arange(clean_len, device=device)
    group_M = torch.tensor(groups, device=device, dtype=torch.long).repeat_interleave(block_len)
    offset_M = torch.arange(block_len, device=device).repeat(len(groups))
    clean = TokenLayout(torch.zeros_like(clean_C), clean_C, clean_C, torch.full_like(clean_C, CLEAN), clean_C)
    position_M = group_M + offset_M
    reach_M = _reach(position_M, causal_masks)
    return clean.then(TokenLayout(torch.zeros_like(group_M), position_M, group_M - 1, group_M, reach_M))


def _reach(position: Tensor, causal_masks: bool) -> Tensor:
    return position if causal_masks else torch.full_like(position, WHOLE_BLOCK)
