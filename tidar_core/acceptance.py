"""How often do drafts stand, and how many tokens a forward does that bring?

What is pending is a whole block, or what is left of one that began earlier, so a plan is a walk over how late in a
block the pending drafts begin; its long-run tokens per forward follow from the walk's stationary law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from tidar_core.modes import StepPlan
from tidar_core.request import DecodeStep
from tidar_core.step import blocks_after

__all__ = ["Acceptance", "Chances", "accepted_lengths", "expected_tokens"]

FORGET = 0.998
"""What is known of every mask still weighs so much after the next verification: what was not tried for long is unknown
again, and will be tried."""
FIRST_CHANCE, WEIGHT = 0.5, 8.0
"""Of the first draft before any was seen; each later one is thought as good as the one before it, as firmly as so many
trials would show it."""
RECOVERY = 0.25
"""Of the first draft behind a correction, before any was seen."""
WALK_STEPS = 24
"""Steps of the walk before its tokens are averaged, and over which they are: a multiple of most periods it can have."""


@dataclass(frozen=True, slots=True)
class Chances:
    """How likely a draft stands, given that those before it did."""

    following: tuple[float, ...]
    """The i-th draft of a whole block; entry 0 is not used."""
    recovering: float
    """The first draft of a block that goes on behind a correction, which its masks could not know. If it stands, those
    after it are thought as good as in a whole block."""


class Acceptance:
    """How often drafts stood."""

    def __init__(self, block_len: int) -> None:
        self.kept, self.tried = [0.0] * (block_len + 1), [0.0] * (block_len + 1)
        """Of the drafts 1..K-1 of whole blocks; entry 0 is not used, entry K is of those behind a correction."""

    def observe(self, step: DecodeStep) -> None:
        """Take in one verification."""
        drafts = min(step.pending, step.verified) - 1
        if drafts < 1:
            return
        self.kept = [FORGET * kept for kept in self.kept]
        self.tried = [FORGET * tried for tried in self.tried]
        for draft in range(1, min(drafts, step.accepted) + 1):
            self._count(-1 if step.late else draft, draft < step.accepted)
            if step.late:
                return

    @property
    def chances(self) -> Chances:
        """What is known by now, and thought of what is not."""
        following = [FIRST_CHANCE]
        for draft in range(1, len(self.kept) - 1):
            following.append(self._share(draft, following[-1]))
        return Chances(tuple(following), self._share(-1, RECOVERY))

    def _count(self, entry: int, stood: bool) -> None:
        self.kept[entry] += stood
        self.tried[entry] += 1.0

    def _share(self, entry: int, prior: float) -> float:
        return (self.kept[entry] + WEIGHT * prior) / (self.tried[entry] + WEIGHT)


def expected_tokens(plans: Sequence[StepPlan], chances: Chances) -> list[float]:
    """Long-run tokens per forward of one sequence that repeats each of `plans`; group 1 must be among their groups.

    The walk's state is the mask that predicted the place of the pending d_1: 0 for a whole block, K for none.
    """
    K = len(chances.following)
    moves, gains = [], []
    laws: dict[tuple[int, int], Tensor] = {}
    for plan in plans:
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        shape = (plan.clean_len, plan.masks(K))
        if shape not in laws:
            laws[shape] = torch.tensor(
                [accepted_lengths(*shape, late, chances) for late in range(K + 1)], dtype=torch.double
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


def accepted_lengths(clean_len: int, width: int, late: int, chances: Chances) -> list[float]:
    """Law of the accepted length 1..clean_len, where mask `late` of a block of `width` predicted d_1's place."""
    drafts = max(0, min(clean_len, width - late) - 1)
    chance = list(chances.following[1 : 1 + drafts])
    if late and drafts:
        chance[0] = chances.recovering
    survival = list(accumulate(chance, mul, initial=1.0))
    law = [a - b for a, b in zip(survival, [*survival[1:], 0.0])]
    return law + [0.0] * (clean_len - len(law))
