"""Model of how often drafts are accepted, and of the tokens per forward that a plan gives.

How many tokens does a plan bring per forward, given the verifications so far?

Acceptance comes in runs. After a block that was accepted whole, the next draft is likely to be accepted. After a block
whose first draft was rejected, it is not likely. The masks of a block could not know a correction, so the rest of the
block behind it is worth less than a whole block. Acceptance rates therefore depend on the outcome before (the
regime) and on whether a block is whole. A plan is a Markov chain. Its state is the regime and the mask position at
which the pending drafts begin. The long-run tokens per forward follow from the chain's stationary distribution.
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
    "AcceptanceRates",
    "PlanChain",
    "expected_tokens",
    "lost_tokens",
    "regime_after",
    "two_pass_chain",
]

NONE, SOME, ALL = range(3)
"""Regimes: how many of the drafts were accepted that were verified last."""

DECAY, FADE = 0.998, 0.9995
"""Decay of the counts of a regime and kind of block with each verification of that kind, and with each other one. So
what few verifications showed is kept for some time, and then explored again."""
FIRST_RATE, PRIOR_VERIFICATIONS = 0.5, 16.0
"""Prior acceptance rate of the first draft, and how many verifications each prior counts for. The prior of each later
draft is the rate of the draft before it."""
OWN_PRIOR = 48.0
"""Verifications that the rates of all requests count for in the rates of one request."""
LATE_RATES = (0.5, 0.7)
"""Prior rates of the drafts behind a correction: the first of them, and each later draft."""
REGIME_ODDS = (1.0, 1.5, 4.0)
"""Prior odds of a draft in each regime, relative to its odds over all regimes."""
OPEN = (1e-9, 1 - 1e-9)
"""Limits of a rate. Within them odds are finite, every chain returns to a whole block and has one stationary
distribution."""


@dataclass(frozen=True, slots=True)
class AcceptanceRates:
    """Probability that a draft is accepted, given that the drafts before it were."""

    whole: tuple[float, ...]
    """Rate of the i-th draft of a whole block; entry 0 is not used."""
    late: tuple[float, float]
    """Rates in a block that goes on behind a correction: its first draft, and each later draft."""


class Acceptance:
    """Counts of accepted drafts by the regime before them; of one request or of all requests.

    Tables have an entry for each draft 1..K-1 of whole blocks (entry 0 is not used). The last two entries are for the
    drafts of late blocks: the first, and all later ones.
    """

    def __init__(self, block_len: int) -> None:
        self.block_len = block_len
        self.kept = [[0.0] * (block_len + 2) for _ in range(3)]
        """Accepted drafts by regime and entry; weighted, so that recent drafts count more."""
        self.tried = [[0.0] * (block_len + 2) for _ in range(3)]
        """Verified drafts by regime and entry, weighted in the same way."""
        self._weight = 1.0

    def observe(self, step: DecodeStep, regime: int) -> None:
        """Count one verification.

        regime   the regime before it
        """
        drafts = min(step.pending, step.verified) - 1
        if drafts < 1:
            return
        self._weight /= FADE  # a growing weight of new counts is a decay of the old ones
        if self._weight > 1e12:
            self._renew()
        K, weight, late = self.block_len, self._weight, step.mask_offset > 0
        tried, kept, accepted = self.tried[regime], self.kept[regime], step.accepted
        for entry in range(K, K + 2) if late else range(1, K):
            tried[entry] *= DECAY / FADE
            kept[entry] *= DECAY / FADE
        for draft in range(1, min(drafts, accepted) + 1):
            entry = draft if not late else K if draft == 1 else K + 1
            tried[entry] += weight
            if draft < accepted:
                kept[entry] += weight

    def rates(self) -> list[AcceptanceRates]:
        """Acceptance rates in each regime: counts with the pooled rates as their prior."""
        pooled = self.pooled()
        return [self._given(regime, pooled, odds, odds) for regime, odds in enumerate(REGIME_ODDS)]

    def pooled(self) -> AcceptanceRates:
        """Acceptance rates over all regimes together."""
        whole = [FIRST_RATE]
        for draft in range(1, self.block_len):
            whole.append(self._share(None, draft, whole[-1]))
        first, later = (self._share(None, self.block_len + i, rate) for i, rate in enumerate(LATE_RATES))
        return AcceptanceRates(tuple(whole), (first, later))

    def with_prior(self, everyone: "Acceptance") -> list[AcceptanceRates]:
        """Acceptance rates of one request in each regime.

        everyone   counts of all requests; their rates are a prior worth OWN_PRIOR verifications of the request's own
        """
        of_all = everyone.pooled()
        own = self._given(None, of_all, weight=OWN_PRIOR)
        whole = _odds(own.whole[1]) / _odds(of_all.whole[1]) if self.block_len > 1 else 1.0
        late = _odds(own.late[0]) / _odds(of_all.late[0])
        return [self._given(regime, prior, whole, late, OWN_PRIOR) for regime, prior in enumerate(everyone.rates())]

    def _given(
        self, regime: int | None, prior: AcceptanceRates, factor: float = 1.0, late_factor: float | None = None,
        weight: float = PRIOR_VERIFICATIONS,
    ) -> AcceptanceRates:  # fmt: skip
        """Rates from the counts and a prior.

        If drafts were accepted more often than the prior predicts, the prior odds of the next draft rise by the same
        factor.
        """
        K, whole = self.block_len, [prior.whole[0]]
        for draft, rate in enumerate(prior.whole[1:], 1):
            whole.append(self._share(regime, draft, _at_odds(rate, factor), weight))
            factor = _odds(whole[-1]) / _odds(rate)
            if draft == 1 and late_factor is None:
                late_factor = factor
        first = self._share(regime, K, _at_odds(prior.late[0], late_factor or 1.0), weight)
        later = self._share(regime, K + 1, _at_odds(prior.late[1], _odds(first) / _odds(prior.late[0])), weight)
        return AcceptanceRates(tuple(whole), (first, later))

    def _share(self, regime: int | None, entry: int, prior: float, weight: float = PRIOR_VERIFICATIONS) -> float:
        regimes = range(3) if regime is None else (regime,)
        kept, tried = (sum(counts[m][entry] for m in regimes) / self._weight for counts in (self.kept, self.tried))
        return (kept + weight * prior) / (tried + weight)

    def _renew(self) -> None:
        self.kept, self.tried = (
            [[c / self._weight for c in of_regime] for of_regime in x] for x in (self.kept, self.tried)
        )
        self._weight = 1.0


def regime_after(regime: int, step: DecodeStep) -> int:
    """The regime after a decode step; a step that verified no draft leaves the regime as it was."""
    if min(step.pending, step.verified) < 2 and step.accepted < 2:
        return regime
    return _regime(step.accepted, step.verified)


def _regime(accepted: int, verified: int) -> int:
    return ALL if accepted == verified else SOME if accepted > 1 else NONE


@dataclass(frozen=True, slots=True)
class PlanChain:
    """Effect of a repeated plan on one sequence."""

    clean_len: int
    """Pending tokens verified."""
    width: int
    """Masks that a block began with."""
    after: tuple[int, ...]
    """Mask that predicted the position of the next pending token, by accepted length from 1; 0 for a whole block."""

    @classmethod
    def of(cls, plan: StepPlan, block_len: int) -> "PlanChain":
        """Chain of a single-pass plan; its groups must contain group 1."""
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        after = (min(block_len, block.mask_offset) for block in blocks_after(plan, block_len)[1:])
        return cls(plan.clean_len, plan.masks(block_len), tuple(after))


def two_pass_chain(clean_len: int, width: int) -> PlanChain:
    """Chain of two-pass rounds: every block is whole.

    clean_len   pending tokens verified
    width       masks of a block
    """
    return PlanChain(clean_len, width, (0,) * clean_len)


def expected_tokens(chains: Sequence[PlanChain], *sequences: Sequence[AcceptanceRates]) -> list[float]:
    """Long-run accepted length of each chain, as a mean over `sequences`.

    sequences   acceptance rates of each sequence in every regime: NONE, SOME, ALL
    """
    matrices = _matrices(tuple(chains), len(sequences[0][0].whole))
    return torch.stack([matrices.tokens(rates) for rates in sequences]).mean(0).tolist()


def lost_tokens(mode: str, tokens: float) -> float:
    """Tokens that a text lacks of what its forwards bring in the long run.

    Its last round ends behind it, by half of the drafts in the mean. A text in single-pass mode begins with a forward
    that verifies nothing, or that drafts beside the prompt.

    tokens  long-run tokens of a cycle of plans
    """
    return (tokens - 1.0) * (1.5 if mode == "single-pass" else 0.5)


class _Matrices:
    """The chains as one batch of matrices: the part that stays the same when acceptance rates change.

    Shape letters: P chains, M = 3 regimes, N = K accepted lengths, X = M * J states. J = K + 1 mask positions, each the
    mask that predicted the position of d_1: 0 for a whole block, K for no drafts.
    """

    def __init__(self, chains: tuple[PlanChain, ...], block_len: int) -> None:
        K, J = block_len, block_len + 1
        tested, target, idle = [], [], []
        for chain in chains:
            drafts = [max(0, min(chain.clean_len, chain.width - late) - 1) for late in range(J)]
            tested.append([[i <= most for i in range(K)] for most in drafts])
            beyond = K - chain.clean_len
            after = [_regime(n, chain.clean_len) * J + late for n, late in enumerate(chain.after, 1)]
            target.append(after + [0] * beyond)
            regimes = range(3) if any(drafts) else (NONE,) * 3  # if no draft is ever verified, one regime is enough
            idle.append([[regime * J + chain.after[0] if most == 0 else -1 for most in drafts] for regime in regimes])
        self.tested_PJN = torch.tensor(tested, dtype=torch.double)
        """1 where a plan verifies draft i of a block that begins at mask J; draft 0 is d_1."""
        self.target_PNX = torch.nn.functional.one_hot(torch.tensor(target), 3 * J).double()
        """State after each accepted length."""
        idle_PX = torch.tensor(idle).flatten(1)
        self.idle_PXX = torch.nn.functional.one_hot(idle_PX.clamp(min=0), 3 * J).double() * (idle_PX >= 0)[..., None]
        """Moves from states in which no draft is verified: they give one token and keep the regime."""
        self.busy_PX1 = (idle_PX < 0)[..., None].double()
        self.identity_XX = torch.eye(3 * J, dtype=torch.double)

    def tokens(self, regimes: Sequence[AcceptanceRates]) -> Tensor:
        """Mean accepted length [P] under the stationary distribution of each chain."""
        J, N = self.tested_PJN.shape[1:]
        late = [[1.0, rates.late[0], *[rates.late[1]] * (N - 2)][:N] for rates in regimes]
        whole = [(1.0, *rates.whole[1:]) for rates in regimes]
        whole_MN, late_MN = (torch.tensor(x, dtype=torch.double).clamp(*OPEN).cumprod(-1) for x in (whole, late))
        survival_MJN = torch.stack([whole_MN, *[late_MN] * (J - 1)], 1)
        reached_PXN = (self.tested_PJN[:, None] * survival_MJN).flatten(1, 2)
        prob_PXN = reached_PXN - torch.nn.functional.pad(reached_PXN[..., 1:], (0, 1))
        move_PXX = self.busy_PX1 * (prob_PXN @ self.target_PNX) + self.idle_PXX
        # stationary: p (M - 1) = 0 and sum p = 1; the sum replaces the last of the dependent equations
        equations = (move_PXX - self.identity_XX).transpose(1, 2)
        equations[:, -1] = 1.0
        state_PX = torch.linalg.solve(equations, self.identity_XX[-1].expand(len(equations), -1))
        return (state_PX * reached_PXN.sum(-1)).sum(-1)


@lru_cache(maxsize=64)
def _matrices(chains: tuple[PlanChain, ...], block_len: int) -> _Matrices:
    return _Matrices(chains, block_len)


def _odds(rate: float) -> float:
    """Odds of a rate, finite and above 0 even if every draft, or no draft, was accepted for long."""
    rate = min(max(rate, OPEN[0]), OPEN[1])
    return rate / (1.0 - rate)


def _at_odds(rate: float, factor: float) -> float:
    """The rate whose odds are `factor` times the odds of `rate`."""
    return factor * rate / (factor * rate + 1.0 - rate)
