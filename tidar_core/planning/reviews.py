"""Reviews of the choice of a plan.

Which review holds for a batch, and is it time for a new one?

A review takes as long as several short steps. So reviews have a share of the time, and come less often as long as the
choice stays the same. Between them the review that holds for the same requests is found at once.
"""

from collections.abc import Callable, KeysView
from dataclasses import dataclass

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.candidate_plans import Candidate
from tidar_core.timing import Clock

__all__ = ["MAX_INDIVIDUAL_BATCH", "Choice", "Review", "Reviews"]

FIRST_REVIEW, LONGEST_REVIEW = 4, 64
"""Decode steps before a new choice is reviewed, and the most between later reviews. The gap doubles as long as the
choice stays the same."""
REVIEW_SHARE, REVIEW_CREDIT, EARLY_SHARE = 0.003, 0.02, 0.03
"""Share of the time that reviews may take, and the seconds beyond it that the first reviews may take. If a review is
longer than a step, these seconds are at most the last number's share of the time. So a model with short steps has not
spent its first reviews before it knows its drafts."""
OWN_SHARE = 0.005
"""Most time of a review over the time of a mean text where lone requests have reviews of their own."""
LOOK_AGAIN = 32
"""Most steps after which a review is looked for again where there was no time for a new one."""
MAX_INDIVIDUAL_BATCH = 1
"""Largest batch in which each request counts with its own acceptance rates, because texts differ much. A larger batch
uses the rates of all requests, since the time of a review grows with the requests."""


@dataclass(frozen=True, slots=True)
class Choice(Candidate):
    """A candidate and its expected speed."""

    tokens_per_second: float
    """Expected speed of the loop without prefills, over all sequences of the batch."""


@dataclass(frozen=True, slots=True)
class Review:
    """A choice, and what was found with it."""

    choice: Choice
    autoregressive_tokens_per_second: float
    probe_every: int
    """Steps from one probe to the next, if the choice is autoregressive."""
    untimed: tuple[StepPlan, ...]
    """Plans to be run now and then, to know their time."""
    other: Candidate | None = None
    """The best candidate of the other mode that drafts, to be run now and then; None if it promises too little."""
    other_every: int = 0
    """Steps from one time that it is run to the next, at most."""
    compared_every: int = 0
    """Steps from one autoregressive step to the next, at most, if the choice drafts."""


@dataclass(frozen=True, slots=True)
class _Dated:
    review: Review
    due: int
    """Decode step at which the next review is due."""
    gap: int


@dataclass(frozen=True, slots=True)
class _Holding:
    """The review that holds for the present requests."""

    review: Review
    requests: frozenset[str]
    until: int
    """Decode step at which it is looked for again."""


class Reviews:
    """The reviews of one planner, by requests or by batch size."""

    def __init__(self, clock: Clock) -> None:
        """clock   seconds, ascending; read before and after each review"""
        self._clock = clock
        self._decoding = self._reviewing = self._requests = 0.0
        """Seconds of all decode steps, of all reviews, and of all steps for each of their requests."""
        self._decoded = self._texts = self._count = 0
        """Decode steps, texts that ended, and reviews."""
        self.forget()

    def forget(self) -> None:
        """Forget all reviews: drafts are made by other weights from now on."""
        self._steps = 0
        self._found: dict[frozenset[str] | int, _Dated] = {}
        self._holding: _Holding | None = None

    def add_step(self, seconds: float, requests: int) -> None:
        """Count the time of a decode step of so many requests."""
        self._decoding, self._decoded = self._decoding + seconds, self._decoded + 1
        self._requests += seconds * requests

    def add_texts(self, texts: int) -> None:
        """Count texts that ended."""
        self._texts += texts

    @property
    def individual(self) -> bool:
        """Whether a text takes so long that one review of its own is a small share of its time."""
        return not self._texts or self._count * OWN_SHARE * self._requests >= self._texts * self._reviewing

    def look_again(self) -> None:
        """Look for the review that holds at the next step: a request is known well by now."""
        self._holding = None

    def holding(self, requests: KeysView[str]) -> tuple[Review, frozenset[str]] | None:
        """The review that holds for a batch and its requests, or None if it is time to `look`.

        Called once for each decode step that is not counted by `skip`.
        """
        self._steps += 1
        held = self._holding
        if held is None or self._steps >= held.until or held.requests != requests:
            return None
        return held.review, held.requests

    def calm(self) -> int:
        """Steps from now on for which the review holds, if the requests stay the same."""
        return 0 if self._holding is None else max(0, self._holding.until - self._steps - 1)

    def skip(self, steps: int) -> None:
        """Count calm steps that were run without `holding`."""
        self._steps += steps

    def look(
        self, requests: KeysView[str], renew: Callable[[Review | None, bool], Review], *, known: bool
    ) -> tuple[Review, frozenset[str]]:
        """The review that holds from now on, with its requests.

        It is the last one, or a new one if that is due and there is time for it. A lone request that is known well has
        a review of its own. The review of all lone requests, with which the next one begins, is renewed meanwhile. The
        review that has waited longer comes first.

        renew     makes a new review; given the last one, and whether requests count with the rates of all
        known     whether the batch has a review of its own
        """
        batch, named = len(requests), frozenset(requests)
        keys: tuple[frozenset[str] | int, ...] = (named, batch) if known else (batch,)
        due = [self._found[key].due if key in self._found else 0 for key in keys]
        until = min(due)
        if self._steps >= until:
            key = keys[due.index(until)]
            lacking = self._lacking(key)
            until = self._steps + (lacking or FIRST_REVIEW)
            if not lacking:
                self._renew(key, renew, alike=key == batch)
        found = next((self._found[key] for key in keys if key in self._found), None) or self._nearest(batch)
        self._holding = _Holding(found.review, named, until)
        return found.review, named

    def _lacking(self, key: frozenset[str] | int) -> int:
        """Decode steps until there may be time for a review; 0 if there is.

        A batch of a size that was not reviewed yet has no choice of its own and need not wait for an early share.
        """
        if not self._found or not self._decoded:
            return 0
        step, credit, share = self._decoding / self._decoded, REVIEW_CREDIT, REVIEW_SHARE
        reviewed = key in self._found or not isinstance(key, int)
        early = EARLY_SHARE * self._decoding
        if reviewed and early < credit and self._reviewing > step * self._count:
            credit, share = early, REVIEW_SHARE + EARLY_SHARE
        lacking = self._reviewing - credit - REVIEW_SHARE * self._decoding
        if lacking <= 0:
            return 0
        return max(1, int(min(lacking / share / step, LOOK_AGAIN))) if step else LOOK_AGAIN

    def _renew(self, key: frozenset[str] | int, renew: Callable[[Review | None, bool], Review], *, alike: bool) -> None:
        began, last = self._clock(), self._found.get(key)
        if last is None:  # drop reviews of single requests that are gone
            self._found = {known: dated for known, dated in self._found.items() if isinstance(known, int)}
        review = renew(None if last is None else last.review, alike)
        holds = last is not None and last.review.choice.cycle == review.choice.cycle
        gap = min(2 * last.gap, LONGEST_REVIEW) if last is not None and holds else FIRST_REVIEW
        self._found[key] = _Dated(review, self._steps + gap, gap)
        self._reviewing, self._count = self._reviewing + self._clock() - began, self._count + 1

    def _nearest(self, batch: int) -> _Dated:
        """The review of the batch that is nearest in size."""
        sizes = [known for known in self._found if isinstance(known, int)]
        nearest = min(sizes, key=lambda size: max(size, batch) / min(size, batch), default=None)
        return next(iter(self._found.values())) if nearest is None else self._found[nearest]
