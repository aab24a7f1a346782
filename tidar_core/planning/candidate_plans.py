"""Candidate plans of the planner.

Which plans are worth comparing?

A candidate is a cycle of plans, taken in turns. If a plan costs nothing but its time, as on a CPU, many candidates are
compared. If each plan must be captured first, a few are compared that lie far apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from tidar_core.decoding.step_plan import StepPlan

__all__ = ["Candidate", "all_candidates", "few_candidates", "first_plan", "timed_plans"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mode and its plans."""

    mode: str
    cycle: tuple[StepPlan, ...]
    """Plans taken in turns; a two-pass round has two."""

    def next_plan(self, pending: int) -> StepPlan:
        """The plan that verifies what is pending; where nothing is, the one that drafts.

        pending  the most tokens pending (d_1 and its drafts) of a sequence
        """
        return self.cycle[-1] if pending > 1 else first_plan(self.cycle[0])


@cache
def first_plan(plan: StepPlan) -> StepPlan:
    """The plan that drafts as `plan` does where nothing is pending."""
    return replace(plan, clean_len=1, groups=(1,)) if plan.groups else plan


@cache
def all_candidates(block_len: int) -> tuple[Candidate, ...]:
    """All candidates, autoregression first.

    A block has no more masks than can be verified, and at most `K`. With C verified tokens it has C masks if every
    outcome has its group. It has C + C - m masks if the later masks of group m must serve the other outcomes.
    """
    K = block_len
    found = [_autoregressive()]
    for C in _among((2, 3, 4, 6, 8, 12, 16, K), 2, K):
        found.append(_two_pass(C))
        for m in _among((1, 2, 3, 4, 6, 8, 12, 16, C), 1, C):
            found += [_single_pass(C, m, width) for width in sorted({C, min(K, 2 * C - m)})]
            if m < C - 1:
                found.append(Candidate("single-pass", (StepPlan(C, (*range(1, m + 1), C), C),)))
    return tuple(found)


@cache
def few_candidates(block_len: int) -> tuple[Candidate, ...]:
    """Autoregression first, then whole, half and quarter blocks with one group up to all."""
    K = block_len
    found = [_autoregressive()]
    for C in _among((K // 4, K // 2, K), 2, K):
        found += [_two_pass(C), *(_single_pass(C, m, C) for m in _among((1, 2, 4, 8, C), 1, C))]
    return tuple(found)


def timed_plans(candidates: Sequence[Candidate]) -> list[StepPlan]:
    """Every plan of `candidates` once."""
    return list(dict.fromkeys(plan for candidate in candidates for plan in candidate.cycle))


def _autoregressive() -> Candidate:
    return Candidate("autoregressive", (StepPlan(1),))


def _two_pass(clean_len: int) -> Candidate:
    return Candidate("two-pass", (StepPlan(1, (1,), clean_len), StepPlan(clean_len)))


def _single_pass(clean_len: int, groups: int, width: int) -> Candidate:
    return Candidate("single-pass", (StepPlan(clean_len, tuple(range(1, groups + 1)), width),))


def _among(counts: Sequence[int], least: int, most: int) -> list[int]:
    return sorted({count for count in counts if least <= count <= most})
