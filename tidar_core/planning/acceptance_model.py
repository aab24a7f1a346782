"""How often do drafts stand, and how many tokens a forward does that bring?

Drafts stand in runs: where all of a block stood, the next is likely to, where the first fell, it is not. And behind a
correction, which its masks could not know, what is left of a block is worth less than a whole one. So chances depend on
the outcome before (the mood) and on whether a block is whole. A plan is then a walk over moods and over how late in a
block the pending drafts begin; its long-run tokens per forward follow from the walk's stationary law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.decoding.plan_tensors import blocks_after
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.step_plan import StepPlan

__all__ = [
    "ALL",
    "NONE",
    "SOME",
    "Acceptance",
    "Chances",
    "PlanChain",
    "expected_tokens",
    "mood_after",
    "two_pass_walk",
]

NONE, SOME, ALL = range(3)
"""Moods: how many of the drafts stood that were last put to the test."""

FORGET = 0.998
"""What is known still weighs so much after the next verification: what was not tried for long is unknown again, and
will be tried."""
FIRST_CHANCE, WEIGHT = 0.5, 16.0
"""Of the first draft before any was seen; each later one is thought as good as the one before it, as firmly as so many
trials would show it."""
LATE_CHANCES = (0.5, 0.7)
"""Of the drafts behind a correction, before any was seen."""
MOOD_ODDS = (1.0, 1.5, 4.0)
"""Of a draft in each mood, over those in all, before any was seen."""
OPEN = (1e-9, 1 - 1e-9)
"""Chances are kept within, so that odds are finite, and every walk comes back to a whole block and has one stationary
law."""


@dataclass(frozen=True, slots=True)
class Chances:
    """How likely a draft stands, given that those before it did."""

    whole: tuple[float, ...]
    """The i-th draft of a whole block; entry 0 is not used."""
    late: tuple[float, float]
    """The first draft of a block that goes on behind a correction, and each later one."""


class Acceptance:
    """How often drafts stood, by the mood before; of one request, or of all."""

    def __init__(self, block_len: int) -> None:
        self.block_len = block_len
        self.kept = [[0.0] * (block_len + 2) for _ in range(3)]
        """By mood, of the drafts 1..K-1 of whole blocks; entry 0 is not used, the last two are of late blocks."""
        self.tried = [[0.0] * (block_len + 2) for _ in range(3)]
        self._weight = 1.0

    def observe(self, step: DecodeStep, mood: int) -> None:
        """Take in one verification, and the mood before it."""
        drafts = min(step.pending, step.verified) - 1
        if drafts < 1:
            return
        self._weight /= FORGET  # the new weighs more, which is the old weighing less
        if self._weight > 1e12:
            self._renew()
        K = self.block_len
        for draft in range(1, min(drafts, step.accepted) + 1):
            entry = draft if not step.late else K if draft == 1 else K + 1
            self.tried[mood][entry] += self._weight
            self.kept[mood][entry] += self._weight * (draft < step.accepted)

    def moods(self) -> list[Chances]:
        """What is known by now, by mood, and thought of what is not."""
        pooled = self.pooled()
        return [self._given(mood, pooled, odds, odds) for mood, odds in enumerate(MOOD_ODDS)]

    def pooled(self) -> Chances:
        """Whatever the mood."""
        whole = [FIRST_CHANCE]
        for draft in range(1, self.block_len):
            whole.append(self._share(None, draft, whole[-1]))
        first, later = (self._share(None, self.block_len + i, chance) for i, chance in enumerate(LATE_CHANCES))
        return Chances(tuple(whole), (first, later))

    def beside(self, everyone: "Acceptance") -> list[Chances]:
        """By mood, of one request, where what is known of all counts as so many trials of its own."""
        of_all = everyone.pooled()
        own = self._given(None, of_all)
        whole = _odds(own.whole[1]) / _odds(of_all.whole[1]) if self.block_len > 1 else 1.0
        late = _odds(own.late[0]) / _odds(of_all.late[0])
        return [self._given(mood, prior, whole, late) for mood, prior in enumerate(everyone.moods())]

    def _given(
        self, mood: int | None, prior: Chances, factor: float = 1.0, late_factor: float | None = None
    ) -> Chances:
        """What was counted, beside a prior. Where drafts stood more often than it says, the next one, while untried, is
        thought to do so by the same factor of the odds."""
        K, whole = self.block_len, [prior.whole[0]]
        for draft, chance in enumerate(prior.whole[1:], 1):
            whole.append(self._share(mood, draft, _at_odds(chance, factor)))
            factor = _odds(whole[-1]) / _odds(chance)
            if draft == 1 and late_factor is None:
                late_factor = factor
        first = self._share(mood, K, _at_odds(prior.late[0], late_factor or 1.0))
        later = self._share(mood, K + 1, _at_odds(prior.late[1], _odds(first) / _odds(prior.late[0])))
        return Chances(tuple(whole), (first, later))

    def _share(self, mood: int | None, entry: int, prior: float) -> float:
        moods = range(3) if mood is None else (mood,)
        kept, tried = (sum(counts[m][entry] for m in moods) / self._weight for counts in (self.kept, self.tried))
        return (kept + WEIGHT * prior) / (tried + WEIGHT)

    def _renew(self) -> None:
        self.kept, self.tried = (
            [[c / self._weight for c in of_mood] for of_mood in x] for x in (self.kept, self.tried)
        )
        self._weight = 1.0


def mood_after(mood: int, step: DecodeStep) -> int:
    """The mood after a step; a step that put no draft to the test changes nothing."""
    if min(step.pending, step.verified) < 2 and step.accepted < 2:
        return mood
    return _mood(step.accepted, step.verified)


def _mood(accepted: int, verified: int) -> int:
    return ALL if accepted == verified else SOME if accepted > 1 else NONE


@dataclass(frozen=True, slots=True)
class PlanChain:
    """What a plan, repeated, does to one sequence."""

    clean_len: int
    """Pending tokens verified."""
    width: int
    """Masks that a block began with."""
    after: tuple[int, ...]
    """By accepted length from 1, the mask that predicted the place of the next pending token: 0 for a whole block."""

    @classmethod
    def of(cls, plan: StepPlan, block_len: int) -> "PlanChain":
        """Single-pass; group 1 must be among the groups."""
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        after = (min(block_len, block.late) for block in blocks_after(plan, block_len)[1:])
        return cls(plan.clean_len, plan.masks(block_len), tuple(after))


def two_pass_walk(clean_len: int, width: int) -> PlanChain:
    """Every block is whole."""
    return PlanChain(clean_len, width, (0,) * clean_len)


def expected_tokens(walks: Sequence[PlanChain], *sequences: Sequence[Chances]) -> list[float]:
    """Long-run accepted length of each walk, as a mean over `sequences`, each given by its chances in every mood."""
    matrices = _matrices(tuple(walks), len(sequences[0][0].whole))
    return torch.stack([matrices.tokens(moods) for moods in sequences]).mean(0).tolist()


class _Matrices:
    """The walks as one batch of matrices: what stays the same when chances change.

    Shape letters: P walks, M = 3 moods, J = K + 1 places in a block (that of the mask which predicted d_1's: 0 for a
    whole block, K for none), X = M * J states, N = K accepted lengths.
    """

    def __init__(self, walks: tuple[PlanChain, ...], block_len: int) -> None:
        K, J = block_len, block_len + 1
        tested, target, idle = [], [], []
        for walk in walks:
            drafts = [max(0, min(walk.clean_len, walk.width - late) - 1) for late in range(J)]
            tested.append([[i <= most for i in range(K)] for most in drafts])
            beyond = K - walk.clean_len
            target.append([_mood(n, walk.clean_len) * J + late for n, late in enumerate(walk.after, 1)] + [0] * beyond)
            moods = range(3) if any(drafts) else (NONE,) * 3  # where nothing is ever tested, one mood is enough
            idle.append([[mood * J + walk.after[0] if most == 0 else -1 for most in drafts] for mood in moods])
        self.tested_PJN = torch.tensor(tested, dtype=torch.double)
        """1 where draft i of a block that is so late is put to the test; draft 0 is d_1."""
        self.target_PNX = torch.nn.functional.one_hot(torch.tensor(target), 3 * J).double()
        """State after each accepted length."""
        idle_PX = torch.tensor(idle).flatten(1)
        self.idle_PXX = torch.nn.functional.one_hot(idle_PX.clamp(min=0), 3 * J).double() * (idle_PX >= 0)[..., None]
        """Where nothing is put to the test, one token comes and the mood stays."""
        self.busy_PX1 = (idle_PX < 0)[..., None].double()
        self.identity_XX = torch.eye(3 * J, dtype=torch.double)

    def tokens(self, moods: Sequence[Chances]) -> Tensor:
        """Mean accepted length [P] under the stationary law of each walk."""
        J, N = self.tested_PJN.shape[1:]
        late = [[1.0, of_mood.late[0], *[of_mood.late[1]] * (N - 2)][:N] for of_mood in moods]
        whole = [(1.0, *of_mood.whole[1:]) for of_mood in moods]
        whole_MN, late_MN = (torch.tensor(x, dtype=torch.double).clamp(*OPEN).cumprod(-1) for x in (whole, late))
        survival_MJN = torch.stack([whole_MN, *[late_MN] * (J - 1)], 1)
        reached_PXN = (self.tested_PJN[:, None] * survival_MJN).flatten(1, 2)
        law_PXN = reached_PXN - torch.nn.functional.pad(reached_PXN[..., 1:], (0, 1))
        move_PXX = self.busy_PX1 * (law_PXN @ self.target_PNX) + self.idle_PXX
        # stationary: p (M - 1) = 0 and sum p = 1, the sum in place of the last of the dependent equations
        equations = (move_PXX - self.identity_XX).transpose(1, 2)
        equations[:, -1] = 1.0
        state_PX = torch.linalg.solve(equations, self.identity_XX[-1].expand(len(equations), -1))
        return (state_PX * reached_PXN.sum(-1)).sum(-1)


@lru_cache(maxsize=64)
def _matrices(walks: tuple[PlanChain, ...], block_len: int) -> _Matrices:
    return _Matrices(walks, block_len)


def _odds(chance: float) -> float:
    """Odds of a chance, finite and above 0 even where every draft, or none, was accepted for long."""
    chance = min(max(chance, OPEN[0]), OPEN[1])
    return chance / (1.0 - chance)


def _at_odds(chance: float, factor: float) -> float:
    """The chance with odds so many times those of `chance`."""
    return factor * chance / (factor * chance + 1.0 - chance)
