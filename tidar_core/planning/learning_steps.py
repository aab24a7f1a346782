"""Steps that are run to learn from, not for their speed.

Which plan comes next: one of the choice, or one whose time or drafts are not known well?

A plan that is never run is never corrected. While the choice is autoregressive, a short block is drafted and verified
now and then, to learn whether drafts would pay by now. While drafts are made, a step now and then is autoregressive,
because drafting must beat its time. The less drafting promises, the more often it is compared so. Plans that promise
nearly the speed of the choice are run while their time is in doubt. The formula alone can be wrong by more than the
difference. For a few steps now and then, the other mode that drafts takes the place of the choice. It verifies drafts
that the choice never verifies.
"""

import math
from collections.abc import Iterable, Sequence

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.reviews import Choice, Review

__all__ = [
    "COMPARED_EVERY",
    "SHORTEST_PROBE",
    "TIMED_EVERY",
    "LearningSteps",
    "compared_every",
    "other_mode",
    "probe_len",
]

PROBE_PART = 4
"""Block length over the length of a probe's block: the first drafts decide whether drafting pays."""
SHORTEST_PROBE = 8
"""Fewest autoregressive steps from one probe to the next."""
EARLY_PROBES = 3
"""Probes that come early: each gap is twice the gap before it, up to the gap of later ones."""
FIRST_COMPARISON, COMPARED_EVERY = 32, 256
"""Steps before the first autoregressive one while drafts are made, and the most before later ones. The gap doubles as
long as the caller allows."""
TIMED_EVERY = 64
"""Steps from one step of a plan whose time is in doubt to the next."""
OTHER_STEPS, FIRST_OTHER = 8, 64
"""Steps of the other mode in a row, and the steps before the first of them. Later gaps double as long as the caller
allows."""
OTHER_PROMISE = 0.7
"""Share of the best one's speed that the best candidate of the other mode must promise, to be run now and then."""
LEARNING_SHARE, LEAST_LOSS = 0.002, 0.1
"""Share of the time that steps of the other mode may cost, and the least part of them that counts as lost. The same
holds for autoregressive steps."""
MOST_CALM = 256
"""Most calm steps from one call of `LearningSteps.next_plan` to the next."""


def probe_len(block_len: int) -> int:
    """Tokens of the block that a probe drafts and verifies."""
    return min(block_len, max(2, block_len // PROBE_PART))


def other_mode(choices: Sequence[Choice], best: Choice) -> tuple[Choice | None, int]:
    """The best choice of the other mode that drafts, and the steps from one time that it is run to the next.

    If it promises too little, there is none.
    """
    others = (choice for choice in choices if choice.mode not in ("autoregressive", best.mode))
    other = max(others, key=lambda choice: choice.tokens_per_second, default=None)
    if other is None or best.mode == "autoregressive":
        return None, 0
    promise = other.tokens_per_second / best.tokens_per_second
    lost = OTHER_STEPS * max(1.0 - promise, LEAST_LOSS)
    return (other, int(lost / LEARNING_SHARE)) if promise >= OTHER_PROMISE else (None, 0)


def compared_every(margin: float, steady_steps: float) -> int:
    """Steps from one autoregressive step to the next while drafts are made, at most.

    margin        logarithm of the speed over that of the autoregressive mode
    steady_steps  steps for which no time is likely to change by so much
    """
    lost = max(1.0 - math.exp(-margin), LEAST_LOSS)
    return int(min(max(lost / LEARNING_SHARE, steady_steps), COMPARED_EVERY))


class LearningSteps:
    """The next plan of a choice, or a step to learn from if one is due."""

    def __init__(self, block_len: int) -> None:
        self._probe_len = probe_len(block_len)
        self._steps = self._since_drafts = self._probes = self._timed = 0
        self._next_comparison = self._comparison_gap = FIRST_COMPARISON
        self._verified = False
        """Whether the pending drafts were verified for the autoregressive step that is due."""
        self._next_untimed = TIMED_EVERY
        self._next_other = self._other_gap = FIRST_OTHER
        self._other_left = 0
        """Steps of the other mode that are left of those in a row."""

    def next_plan(self, review: Review, pending: int, untimed: Iterable[StepPlan]) -> StepPlan:
        """The plan of the next step.

        pending  the most tokens pending (d_1 and its drafts) of a sequence
        untimed  plans of the review whose time is still in doubt
        """
        self._steps += 1
        if review.other is None:
            self._other_left = 0
        elif self._others(review.other_every):
            return review.other.next_plan(pending)
        choice = review.choice
        plan = self._untimed(choice.mode, pending, untimed) if self._steps >= self._next_untimed else None
        if plan is not None:
            return plan
        if choice.mode == "autoregressive":
            return self._probe(pending, review.probe_every)
        self._probes = 0
        if self._steps < self._next_comparison:
            return choice.next_plan(pending)
        if pending > 1 and not self._verified:  # only once: other sequences may come with drafts at every step
            self._verified = True
            return StepPlan(choice.cycle[-1].clean_len)
        self._verified = False
        self._next_comparison = self._steps + self._comparison_gap
        self._comparison_gap = min(2 * self._comparison_gap, review.compared_every)
        return StepPlan(1)

    def calm(self, review: Review, *, untimed: bool) -> int:
        """Steps from now on in which `next_plan` would return the choice's own plan, at most MOST_CALM.

        `next_plan` was called with the same arguments, and returned such a plan. Under an autoregressive choice no
        drafts are pending.
        """
        left = [1 + MOST_CALM]
        if review.other is not None:
            left.append(0 if self._other_left > 0 else self._next_other - self._steps)
        if untimed:
            left.append(self._next_untimed - self._steps)
        if review.choice.mode != "autoregressive":
            left.append(self._next_comparison - self._steps)
        elif review.probe_every:
            left.append(self._early(review.probe_every) - self._since_drafts)
        return max(0, min(left) - 1)

    def skip(self, steps: int, mode: str) -> None:
        """Count calm steps that were run without `next_plan`."""
        self._steps += steps
        if mode == "autoregressive":
            self._since_drafts += steps

    def _others(self, every: int) -> bool:
        """Whether the other mode that drafts takes this step."""
        if self._steps >= self._next_other:
            self._next_other, self._other_left = self._steps + self._other_gap, OTHER_STEPS
            self._other_gap = min(2 * self._other_gap, every)
        self._other_left -= 1
        return self._other_left >= 0

    def _untimed(self, mode: str, pending: int, untimed: Iterable[StepPlan]) -> StepPlan | None:
        """The untimed plan that is next; None where it must wait for drafts to be verified, or where there is none.

        In single-pass mode drafts are pending at all times. A plan that verifies none of them costs a step's drafts.
        """
        plans = tuple(untimed)
        plan = plans[self._timed % len(plans)] if plans else None
        if plan is not None and mode != "single-pass" and (pending > 1) != (mode == "two-pass" and plan.clean_len > 1):
            return None
        self._timed, self._next_untimed = self._timed + 1, self._steps + TIMED_EVERY
        return plan

    def _probe(self, pending: int, every: int) -> StepPlan:
        """Plan of an autoregressive step, or of a probe if it is due: a block is drafted, then verified."""
        if pending > 1:
            self._since_drafts, self._probes = 0, self._probes + 1
            return StepPlan(self._probe_len)
        self._since_drafts += 1
        if not every or self._since_drafts < self._early(every):
            return StepPlan(1)
        return StepPlan(1, (1,), self._probe_len)

    def _early(self, every: int) -> int:
        """Autoregressive steps before the next probe, where later ones come every so many steps."""
        return max(SHORTEST_PROBE, every >> max(0, EARLY_PROBES - self._probes))
