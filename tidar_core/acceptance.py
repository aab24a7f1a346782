"""How often do drafts stand, and how many tokens a forward does that bring?

A draft's chance depends on which mask of its block it came from, so a plan is a walk over how late in a block the
pending drafts began; its long-run tokens per forward follow from the walk's stationary law.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from tidar_core.modes import StepPlan
from tidar_core.request import DecodeStep
from tidar_core.step import blocks_after

__all__ = ["Acceptance", "accepted_lengths", "expected_tokens"]

FORGET = 0.998
"""What is known of every mask still weighs so much after the next verification: what was not tried for long is unknown
again, and will be tried."""
FIRST_CHANCE, WEIGHT = 0.5, 8.0
"""Of the first draft before any was seen; each later one is thought as good as the one before it, as firmly as so many
trials would show it."""
WALK_STEPS = 24
"""Steps of the walk before its tokens are averaged, and over which they are: a multiple of most periods it can have."""


class Acceptance:
    """How often the i-th mask of a block drafted a token that stood, given that those before it did."""

    def __init__(self, block_len: int) -> None:
        self.kept = [0.0] * block_len
        self.tried = [0.0] * block_len

    def observe(self, step: DecodeStep) -> None:
        """Take in one verification."""
        if min(step.pending, step.verified) < 2:
            return
        self.kept = [FORGET * kept for kept in self.kept]
        self.tried = [FORGET * tried for tried in self.tried]
        for draft in range(1, min(step.pending, step.verified)):
            if draft > step.accepted:
                return
            self.kept[step.late + draft] += draft < step.accepted
            self.tried[step.late + draft] += 1.0

    @property
    def chance(self) -> list[float]:
        """For masks 0..K-1; entry 0 is not used: the first token of a block is final."""
        chances = [FIRST_CHANCE]
        for kept, tried in zip(self.kept[1:], self.tried[1:]):
            chances.append((kept + WEIGHT * chances[-1]) / (tried + WEIGHT))
        return chances


def expected_tokens(plans: Sequence[StepPlan], chance: Sequence[float]) -> list[float]:
    """Long-run tokens per forward of one sequence that repeats each of `plans`; group 1 must be among their groups.

    The walk's state is the mask that predicted the place of the pending d_1: 0 for a whole block, K for none.
    """
    K = len(chance)
    moves, gains = [], []
    laws: dict[tuple[int, int], Tensor] = {}
    for plan in plans:
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        shape = (plan.clean_len, plan.masks(K))
        if shape not in laws:
            laws[shape] = torch.tensor(
                [accepted_lengths(*shape, late, chance) for late in range(K + 1)], dtype=torch.double
            )
        after = [min(K, block.late) for block in blocks_after(plan, K)[1:]]
        law = laws[shape]
        moves.append(torch.zeros(K + 1, K + 1, dtype=torch.double).index_add_(1, torch.tensor(after), law))
        gains.append(law @ torch.arange(1.0, plan.clean_len + 1, dtype=torch.double))
    move, gain = torch.stack(moves), torch.stack(gains)
    state = torch.zeros(len(plans), 1, K + 1, dtype=torch.double)
    state[..., 0] = 1.0
    tokens = torch.zeros(len(plans), dtype=torch.double)
    for step in range(2 * WALK_STEPS):
        if step >= WALK_STEPS:
            tokens += (state[:, 0] * gain).sum(-1)
        state = state @ move
    return (tokens / WALK_STEPS).tolist()


def accepted_lengths(clean_len: int, width: int, late: int, chance: Sequence[float]) -> list[float]:
    """Law of the accepted length 1..clean_len, where mask `late` of a block of `width` predicted d_1's place."""
    drafts = max(0, min(clean_len, width - late) - 1)
    survival = list(accumulate(chance[late + 1 : late + 1 + drafts], mul, initial=1.0))
    law = [a - b for a, b in zip(survival, [*survival[1:], 0.0])]
    return law + [0.0] * (clean_len - len(law))
