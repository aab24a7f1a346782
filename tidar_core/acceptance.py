"""How often do drafts stand, and how many tokens a forward does that bring?

What is pending is a whole block, or what is left of one that began earlier, so a plan is a walk over how late in a
block the pending drafts begin; its long-run tokens per forward follow from the walk's stationary law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul

import torch

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
OPEN = (1e-9, 1 - 1e-9)
"""Chances are kept within, so that every walk comes back to a whole block and has one stationary law."""


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
    """Long-run tokens per forward of one sequence that repeats each of `plans`; group 1 must be among their groups."""
    return _walks(tuple(plans), len(chances.following)).tokens(chances)


def accepted_lengths(clean_len: int, width: int, late: int, chances: Chances) -> list[float]:
    """Law of the accepted length 1..clean_len, where mask `late` of a block of `width` predicted d_1's place."""
    drafts = max(0, min(clean_len, width - late) - 1)
    chance = list(chances.following[1 : 1 + drafts])
    if late and drafts:
        chance[0] = chances.recovering
    survival = list(accumulate(chance, mul, initial=1.0))
    law = [a - b for a, b in zip(survival, [*survival[1:], 0.0])]
    return law + [0.0] * (clean_len - len(law))


class _Walks:
    """The walks of some plans, as one batch of matrices: what stays the same when chances change.

    Shape letters: P plans, J = K + 1 states (the mask that predicted the place of the pending d_1: 0 for a whole block,
    K for none), N = K lengths.
    """

    def __init__(self, plans: tuple[StepPlan, ...], block_len: int) -> None:
        K, drafts, after = block_len, [], []
        for plan in plans:
            assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
            blocks = blocks_after(plan, K)[1:]
            longest = [max(0, min(plan.clean_len, plan.masks(K) - late) - 1) for late in range(K + 1)]
            drafts.append([[i <= most for i in range(K)] for most in longest])
            after.append([min(K, block.late) for block in blocks] + [K] * (K - len(blocks)))
        self.tested_PJN = torch.tensor(drafts, dtype=torch.double)
        """1 where draft i of a block that is so late is put to the test; draft 0 is d_1."""
        self.state_PNJ = torch.nn.functional.one_hot(torch.tensor(after), K + 1).double()
        """State after each accepted length."""
        self.states = torch.eye(K + 1, dtype=torch.double)

    def tokens(self, chances: Chances) -> list[float]:
        """Mean accepted length under the stationary law of each walk."""
        following = torch.tensor((1.0, *chances.following[1:]), dtype=torch.double).clamp(*OPEN)
        recovering = torch.tensor(chances.recovering, dtype=torch.double).clamp(*OPEN)
        whole_N = following.cumprod(0)
        late_N = torch.cat([whole_N[:1], whole_N[1:] * (recovering / following[1])]) if len(whole_N) > 1 else whole_N
        reached_PJN = self.tested_PJN * torch.stack([whole_N, *[late_N] * (len(self.states) - 1)])
        law_PJN = reached_PJN - torch.nn.functional.pad(reached_PJN[..., 1:], (0, 1))
        move_PJJ = law_PJN @ self.state_PNJ
        # stationary: p (M - 1) = 0 and sum p = 1, the sum in place of the last of the dependent equations
        equations = (move_PJJ - self.states).transpose(1, 2)
        equations[:, -1] = 1.0
        state_PJ = torch.linalg.solve(equations, self.states[-1].expand(len(equations), -1))
        return (state_PJ * reached_PJN.sum(-1)).sum(-1).tolist()


@lru_cache(maxsize=64)
def _walks(plans: tuple[StepPlan, ...], block_len: int) -> _Walks:
    return _Walks(plans, block_len)
