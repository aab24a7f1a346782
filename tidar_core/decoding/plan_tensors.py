"""Which tensors does a forward read of its plan?

What a plan alone decides lies on the device before the forward: where each row stands, which rows it sees, and which
masks draft the next block. A captured forward finds these tensors by their addresses, so its owner keeps them.

Shape letters: C clean rows, K block length, M masks of a block, N outcomes, R rows of a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.transformer.layout import decode_rows
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["NextBlock", "PlanTensors", "RowPattern", "block_after", "blocks_after"]


@dataclass(frozen=True, slots=True)
class NextBlock:
    """Which masks of a forward draft the next block."""

    first_row: int
    """Row of the mask at the position of the next d_1; those after it draft d_2, d_3, .."""
    pending: int
    """d_1 and the drafts after it."""
    late: int
    """Which mask of its block predicted d_1's place, from 0; of no meaning where nothing else is pending."""


@dataclass(frozen=True, slots=True)
class RowPattern:
    """The rows of one forward, the same for every sequence of its batch."""

    masks: int
    """Rows that are masks; the clean ones stand before them."""
    position_R: Tensor
    """Behind an empty prefix."""
    visible_RR: Tensor
    """True where a row sees a row."""

    @staticmethod
    def of(clean_len: int, groups: tuple[int, ...], width: int, device: torch.device) -> "RowPattern":
        """`clean_len` clean rows, then `width` masks for each group."""
        rows = decode_rows(clean_len, groups, width, device)
        return RowPattern(len(groups) * width, rows.position, dense_visibility(rows, rows))


@dataclass(frozen=True, slots=True)
class PlanTensors:
    """A plan and the tensors that its forward reads."""

    plan: StepPlan
    pattern: RowPattern
    draft_row_NM: Tensor
    """By outcome: the rows of the masks that draft d_2, d_3, .. of the next block; M is one mask less than a block."""
    guessed_NM: Tensor
    """Whether there is such a mask."""

    @staticmethod
    def of(plan: StepPlan, block_len: int, device: torch.device) -> "PlanTensors":
        """Of a decode step; its outcomes are the accepted lengths 0..C."""
        return _plan_tensors(plan, block_len, device, blocks_after(plan, block_len))

    @staticmethod
    def of_prefill(plan: StepPlan, block_len: int, device: torch.device) -> "PlanTensors":
        """Of a prefill; its one outcome is that all C tokens stand."""
        return _plan_tensors(plan, block_len, device, [block_after(plan, block_len, plan.clean_len)])


def block_after(plan: StepPlan, block_len: int, accepted: int) -> NextBlock:
    """Which masks of the forward draft the next block, once `accepted` of 1..C tokens stand.

    The masks of the largest group that is no larger; where that is smaller, its later ones.
    """
    width = plan.masks(block_len)
    below = [index for index, group in enumerate(plan.groups) if group <= accepted]
    late = accepted - plan.groups[below[-1]] if below else width
    first_row = plan.clean_len + below[-1] * width + late if late < width else 0
    return NextBlock(first_row, max(1, width - late), late)


@lru_cache(maxsize=1024)
def blocks_after(plan: StepPlan, block_len: int) -> tuple[NextBlock, ...]:
    """`block_after` of each accepted length 0..C of a decode step; entry 0 has no meaning."""
    return (NextBlock(0, 1, 0), *(block_after(plan, block_len, n) for n in range(1, plan.clean_len + 1)))


def _plan_tensors(plan: StepPlan, block_len: int, device: torch.device, blocks: Sequence[NextBlock]) -> PlanTensors:
    width, rows, guessed = plan.masks(block_len), [], []
    for block in blocks:
        there = [offset < block.pending for offset in range(1, width)]
        rows.append([block.first_row + offset if masked else 0 for offset, masked in enumerate(there, 1)])
        guessed.append(there)
    return PlanTensors(
        plan,
        RowPattern.of(plan.clean_len, plan.groups, width, device),
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(guessed, dtype=torch.bool, device=device),
    )
