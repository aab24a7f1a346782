"""Tensors that a forward reads of its plan.

They depend on the plan alone and lie on the device before the forward: positions, visibility, and the masks that draft
the next block. A captured forward finds these tensors by their addresses, so its owner keeps them.

Shape letters: C clean tokens, K block length, M masks of a block, N outcomes, R query tokens of a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.transformer.layout import decode_rows
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["NextBlock", "PlanTensors", "QueryPattern", "block_after", "blocks_after"]


@dataclass(frozen=True, slots=True)
class NextBlock:
    """The masks of a forward that draft the next block."""

    first_mask: int
    """Query token of the mask at the position of the next d_1; the masks after it draft d_2, d_3, .."""
    pending: int
    """d_1 and the drafts after it."""
    mask_offset: int
    """Index in its block, from 0, of the mask at the place of d_1; without meaning where no draft is pending."""


@dataclass(frozen=True, slots=True)
class QueryPattern:
    """The query tokens of one forward, the same for every sequence of its batch."""

    masks: int
    """Number of masks; the clean tokens come before them."""
    offset_M: Tensor
    """Index of each mask in its block, from 0."""
    position_R: Tensor
    """Positions after an empty prefix."""
    visible_RR: Tensor
    """True where a query token sees another."""

    @staticmethod
    def of(
        clean_len: int, groups: tuple[int, ...], width: int, device: torch.device, *, causal_masks: bool = False
    ) -> "QueryPattern":
        """The pattern of `clean_len` clean tokens, then `width` masks for each group."""
        layout = decode_rows(clean_len, groups, width, device, causal_masks=causal_masks)
        return QueryPattern(
            len(groups) * width, layout.offset[clean_len:], layout.position, dense_visibility(layout, layout)
        )


@dataclass(frozen=True, slots=True)
class PlanTensors:
    """A plan and the tensors that its forward reads."""

    plan: StepPlan
    pattern: QueryPattern
    draft_index_NM: Tensor
    """Query tokens of the masks that draft d_2, d_3, .. of the next block, by outcome; M is one mask less than a
    block."""
    guessed_NM: Tensor
    """Whether the mask exists."""

    @staticmethod
    def of(plan: StepPlan, block_len: int, device: torch.device, *, causal_masks: bool = False) -> "PlanTensors":
        """Tensors of a decode step; its outcomes are the accepted lengths 0..C."""
        return _plan_tensors(plan, block_len, device, causal_masks, blocks_after(plan, block_len))

    @staticmethod
    def of_prefill(
        plan: StepPlan, block_len: int, device: torch.device, *, causal_masks: bool = False
    ) -> "PlanTensors":
        """Tensors of a prefill; its only outcome is that all C tokens are accepted."""
        return _plan_tensors(plan, block_len, device, causal_masks, [block_after(plan, block_len, plan.clean_len)])


def block_after(plan: StepPlan, block_len: int, accepted: int) -> NextBlock:
    """The masks of the forward that draft the next block after `accepted` of 1..C tokens were accepted.

    They belong to the largest group that is not above `accepted`; where that group is below it, to its later masks.
    """
    width = plan.masks(block_len)
    below = [index for index, group in enumerate(plan.groups) if group <= accepted]
    offset = accepted - plan.groups[below[-1]] if below else width
    first_mask = plan.clean_len + below[-1] * width + offset if offset < width else 0
    return NextBlock(first_mask, max(1, width - offset), offset)


@lru_cache(maxsize=1024)
def blocks_after(plan: StepPlan, block_len: int) -> tuple[NextBlock, ...]:
    """`block_after` of each accepted length 0..C of a decode step; entry 0 has no meaning."""
    return (NextBlock(0, 1, 0), *(block_after(plan, block_len, n) for n in range(1, plan.clean_len + 1)))


def _plan_tensors(
    plan: StepPlan, block_len: int, device: torch.device, causal_masks: bool, blocks: Sequence[NextBlock]
) -> PlanTensors:
    width, indices, guessed = plan.masks(block_len), [], []
    for block in blocks:
        there = [offset < block.pending for offset in range(1, width)]
        indices.append([block.first_mask + offset if masked else 0 for offset, masked in enumerate(there, 1)])
        guessed.append(there)
    return PlanTensors(
        plan,
        QueryPattern.of(plan.clean_len, plan.groups, width, device, causal_masks=causal_masks),
        torch.tensor(indices, dtype=torch.long, device=device),
        torch.tensor(guessed, dtype=torch.bool, device=device),
    )
