"""Which ways to decode are worth weighing?

A way is a cycle of plans, taken in turns. Where a plan costs nothing but its time, as on a CPU, many are weighed; where
each must be captured first, a few that lie far apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tidar_core.decoding.step_plan import StepPlan

__all__ = ["Candidate", "all_candidates", "few_ways", "timed_plans"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mode and its plans."""

    mode: str
    cycle: tuple[StepPlan, ...]
    """A two-pass round has two."""


@cache
def all_candidates(block_len: int) -> tuple[Candidate, ...]:
    """Autoregression first.

    Blocks have no more masks than can be verified: C of them where every outcome has its group, C + C - m where the
    later masks of group m must serve, or K.
    """
    K = block_len
    ways = [_autoregressive()]
    for C in _among((2, 3, 4, 6, 8, 12, 16, K), 2, K):
        ways.append(_two_pass(C))
        for m in _among((1, 2, 3, 4, 6, 8, 12, 16, C), 1, C):
            ways += [_single_pass(C, m, width) for width in sorted({C, min(K, 2 * C - m)})]
            if m < C - 1:
                ways.append(Candidate("single-pass", (StepPlan(C, (*range(1, m + 1), C), C),)))
    return tuple(ways)


@cache
def few_ways(block_len: int) -> tuple[Candidate, ...]:
    """Autoregression first, then whole, half and quarter blocks with one group up to all."""
    K = block_len
    ways = [_autoregressive()]
    for C in _among((K // 4, K // 2, K), 2, K):
        ways += [_two_pass(C), *(_single_pass(C, m, C) for m in _among((1, 2, 4, 8, C), 1, C))]
    return tuple(ways)


def timed_plans(ways: Sequence[Candidate]) -> list[StepPlan]:
    """Every plan of `ways` once."""
    return list(dict.fromkeys(plan for way in ways for plan in way.cycle))


def _autoregressive() -> Candidate:
    return Candidate("autoregressive", (StepPlan(1),))


def _two_pass(clean_len: int) -> Candidate:
    return Candidate("two-pass", (StepPlan(1, (1,), clean_len), StepPlan(clean_len)))


def _single_pass(clean_len: int, groups: int, width: int) -> Candidate:
    return Candidate("single-pass", (StepPlan(clean_len, tuple(range(1, groups + 1)), width),))


def _among(counts: Sequence[int], least: int, most: int) -> list[int]:
    return sorted({count for count in counts if least <= count <= most})
