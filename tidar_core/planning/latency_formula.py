"""Formula of the time of a decode step, fitted to a few measured steps.

How long does a step of any shape take, when few shapes were measured?

The time is a sum of terms: weights that are read once, query tokens in total, sequences, keys and values that are read.
Products of few query tokens have terms of their own, and so have query tokens beyond several knees (the free-token-slot
curve; TiDAR, section 2). The cost of every term is positive, so a larger step never takes less time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import mul

import torch
from torch import Tensor

__all__ = ["LatencyFormula", "LatencyPoint", "Weighted"]

FEW, MANY = (2, 4, 16), (16, 64, 256, 1024)
"""Query tokens in total at which the cost of the next one changes: products of few tokens, and knees."""
FORMULA_ERROR = 0.01
"""Relative error of the best formula, as a standard deviation."""
FIRST_SHARE, UNKNOWN = 1e-3, 3.0
"""Share of a term in the mean time of a step before anything was measured, and the standard deviation of its logarithm.
A term that explains nothing stays small."""
KEY_TERMS, KEYS_SHARE = slice(0, 2), 1e-6
"""Terms that grow with the context, and their share: if only one context was measured, they stay small."""
LEAST_SHARE = 1e-15
"""Share of one unit of a term that no measured step has."""
MOST_ATTEMPTS, SETTLED = 60, 1e-4
"""Most attempts of a fit, and the relative change of the misfit by an attempt that ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPoint:
    """One measured shape."""

    rows: int
    """Query tokens of one sequence."""
    batch: int
    context: int
    """Clean tokens of each sequence in the cache."""
    seconds: float
    drafts: bool = False
    """Whether masks are among the query tokens and drafts are made of them, which costs a little more."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """A measured shape and its weight in a fit."""

    point: LatencyPoint
    error: float = 0.0
    """Relative error of the measured time, as a standard deviation."""


@dataclass(frozen=True)
class LatencyFormula:
    """Costs of all terms."""

    log_costs: tuple[float, ...]
    """Logarithm of the seconds that one unit of each term takes."""

    @classmethod
    def of(cls, points: Sequence[LatencyPoint]) -> "LatencyFormula":
        """Formula of measured steps, at least one."""
        typical, mean = sum(point.seconds for point in points) / len(points), _terms_of(points).mean(0)
        shares = torch.full_like(mean, FIRST_SHARE)
        shares[KEY_TERMS] = KEYS_SHARE
        costs = typical * torch.where(mean > 0, shares / mean.clamp(min=1.0), LEAST_SHARE)
        return cls(tuple(costs.log().tolist())).fitted([Weighted(point) for point in points], spread=UNKNOWN)

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected seconds of a step.

        rows    query tokens of one sequence
        drafts  masks are among them
        """
        return sum(map(mul, self._costs, _terms(rows, batch, context, drafts)))

    def fitted(
        self, measured: Sequence[Weighted], *, spread: float, start: "LatencyFormula | None" = None
    ) -> "LatencyFormula":
        """The likeliest formula after measurements, if this one was expected (Levenberg-Marquardt).

        spread  standard deviation of the logarithm of each cost from this one's
        start   a formula that is likely near; this one by default
        """
        fit = _Fit(measured, self, spread)
        found = torch.tensor((start or self).log_costs, dtype=torch.double)
        misfit, damping = fit.misfit(found), 1e-3
        for _ in range(MOST_ATTEMPTS):
            attempt = found + fit.step(found, damping)
            of_attempt = fit.misfit(attempt)
            gain, settled = misfit - of_attempt, abs(misfit - of_attempt) < SETTLED * misfit
            damping *= 0.25 if gain > 0 else 4.0
            if gain > 0:
                found, misfit = attempt, of_attempt
            if settled:
                break
        return LatencyFormula(tuple(found.tolist()))

    @cached_property
    def _costs(self) -> tuple[float, ...]:
        return tuple(math.exp(cost) for cost in self.log_costs)


class _Fit:
    """Squared errors of the logarithms of times and costs; N measurements, J terms."""

    def __init__(self, measured: Sequence[Weighted], prior: LatencyFormula, spread: float) -> None:
        points = [weighted.point for weighted in measured]
        self._terms_NJ = _terms_of(points)
        self._log_seconds_N = torch.tensor([point.seconds for point in points], dtype=torch.double).log()
        self._weight_N = torch.tensor([1 / math.hypot(FORMULA_ERROR, m.error) for m in measured], dtype=torch.double)
        self._prior_J, self._spread = torch.tensor(prior.log_costs, dtype=torch.double), spread

    def misfit(self, log_costs_J: Tensor) -> float:
        """Sum of all squared errors, each over its expected size."""
        times, costs = self._errors(self._terms_NJ @ log_costs_J.exp(), log_costs_J)
        return float(times @ times + costs @ costs)

    def step(self, log_costs_J: Tensor, damping: float) -> Tensor:
        """Change of the logarithms of costs that lowers the misfit most, as far as it is linear."""
        parts_NJ = self._terms_NJ * log_costs_J.exp()
        seconds_N = parts_NJ.sum(1)
        times_N, costs_J = self._errors(seconds_N, log_costs_J)
        slope_NJ = parts_NJ * (self._weight_N / seconds_N)[:, None]
        curvature_JJ = slope_NJ.T @ slope_NJ
        curvature_JJ.diagonal().add_(1 / self._spread**2)
        curvature_JJ.diagonal().mul_(1 + damping)
        gradient_J = slope_NJ.T @ times_N + costs_J / self._spread
        return torch.linalg.solve(curvature_JJ, -gradient_J).clamp(-2.0, 2.0)

    def _errors(self, seconds_N: Tensor, log_costs_J: Tensor) -> tuple[Tensor, Tensor]:
        times_N = (seconds_N.log() - self._log_seconds_N) * self._weight_N
        return times_N, (log_costs_J - self._prior_J) / self._spread


def _terms_of(points: Sequence[LatencyPoint]) -> Tensor:
    return torch.tensor([_terms(p.rows, p.batch, p.context, p.drafts) for p in points], dtype=torch.double)


def _terms(rows: int, batch: int, context: int, drafts: bool) -> tuple[float, ...]:
    """Units of each term of a step, KEY_TERMS first."""
    keys = batch * context
    return (keys, rows * keys, *_other_terms(rows, batch, drafts))


@lru_cache(maxsize=1024)
def _other_terms(rows: int, batch: int, drafts: bool) -> tuple[float, ...]:
    queries = rows * batch
    few, many = (min(queries, most) for most in FEW), (max(0, queries - knee) for knee in MANY)
    return (1.0, batch, queries, *few, *many, float(drafts), float(drafts) * batch)
