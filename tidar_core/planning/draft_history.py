"""Record of the drafts that were verified lately.

Which drafts were accepted, in which texts?

Drafts are accepted in runs: a text has easy and hard passages. So outcomes are kept in their order, in windows of one
text, or of joined ends of texts. An outcome is the entry of the draft and whether it was accepted. Entries 1..K-1 are
the drafts of a whole block by their place. A block that goes on behind a correction could not know the correction. Its
first draft has entry K, its later drafts K + 1. The token behind a block that was accepted whole had no draft, so it
is no outcome.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate, islice

from tidar_core.decoding.request import DecodeStep

__all__ = ["WINDOW_LEN", "DraftHistory", "Excerpt", "Window", "entries_by_kind"]

Window = list[int]
"""Outcomes in their order: 2 * entry, and 1 more if the draft was accepted."""

WINDOW_LEN, WINDOWS = 32, 128
"""Least outcomes of a full window, and the most windows that are kept."""
NEWEST, REPRESENTATIVES = 2048, 24
"""Outcomes of the newest windows, and the most windows that stand for these in a forecast."""
OWN_WINDOWS = 8
"""Full windows of one request that are kept."""
PRIOR = [2, 3, 3, 3, 2, 3, 2, 2]
"""The window before all others: half of its first drafts are accepted, in an uneven order."""
OWN_PRIOR = 192.0
"""Outcomes that the windows of all requests count for beside those of one request."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Windows, and those of them that a forecast is made from."""

    windows: list[Window]
    """Everything that is kept."""
    weights: dict[int, float]
    """Weight of an outcome by the number of its window; the others have none."""


@dataclass(slots=True)
class _Text:
    """Outcomes of one running request."""

    open: Window = field(default_factory=list)
    full: deque[Window] = field(default_factory=lambda: deque(maxlen=OWN_WINDOWS))
    verifications: int = 0


def entries_by_kind(block_len: int) -> tuple[list[int], list[int]]:
    """Entries of the drafts of a whole block, and of one that goes on behind a correction, by their place."""
    return list(range(1, block_len)), [block_len, *[block_len + 1] * (block_len - 2)][: block_len - 1]


class DraftHistory:
    """Outcomes of the newest drafts of all requests."""

    def __init__(self, block_len: int) -> None:
        self._accepted = [[2 * entry + 1 for entry in entries] for entries in entries_by_kind(block_len)]
        """Outcomes of accepted drafts, of whole blocks and of blocks behind a correction."""
        self._windows = deque([list(PRIOR)], maxlen=WINDOWS)
        self._ends: Window = []
        """Ends of texts that fill no window, joined."""
        self._texts: dict[str, _Text] = {}

    def observe(self, step: DecodeStep) -> int:
        """Record the drafts of one verification, up to the first rejected one.

        Returns the request's verifications so far; 0 if no draft was verified.
        """
        most, accepted, count = min(step.pending, step.verified), step.accepted, 0
        if most > 1:
            text = self._texts.get(step.request_id)
            if text is None:
                text = self._texts[step.request_id] = _Text()
            outcomes = self._accepted[step.mask_offset > 0]
            window = text.open
            window.extend(outcomes[: min(accepted, most) - 1])
            if accepted < most:
                window.append(outcomes[accepted - 1] - 1)
            text.verifications = count = text.verifications + 1
            if len(window) >= WINDOW_LEN:
                text.full.append(window)
                self._windows.append(window)
                text.open = []
        if step.finish_reason is not None:
            self._end(step.request_id)
        return count

    def verifications(self, request: str) -> int:
        """Verifications of a running request."""
        text = self._texts.get(request)
        return 0 if text is None else text.verifications

    def keep(self, requests: Collection[str]) -> None:
        """Close the texts of all requests but these: aborted ones never report a finish."""
        for request in [known for known in self._texts if known not in requests]:
            self._end(request)

    def __len__(self) -> int:
        """Texts that are not closed."""
        return len(self._texts)

    def excerpt(self, request: str | None = None) -> Excerpt:
        """Windows that stand for the newest ones: evenly spread over their shares of accepted drafts.

        request  a request whose own windows count for more; all count alike if it is not named or not known
        """
        text = None if request is None else self._texts.get(request)
        own = [] if text is None else [window for window in (*text.full, text.open) if window]
        others = [window for window in self._windows if not any(window is mine for mine in own)]
        others += [
            window for window in (self._ends, *(x.open for x in self._texts.values() if x is not text)) if window
        ]
        others = others[-WINDOWS:]
        sums = accumulate(len(window) for window in reversed(others))
        older = sum(outcomes >= NEWEST for outcomes in islice(sums, len(others) - 1))
        newest = sorted(range(older, len(others)), key=lambda number: _share(others[number]))
        count = min(REPRESENTATIVES, len(newest))
        chosen = [newest[(2 * i + 1) * len(newest) // (2 * count)] for i in range(count)]
        outcomes = sum(len(others[number]) for number in chosen)
        weight = OWN_PRIOR / max(OWN_PRIOR, outcomes) if own else 1.0
        weights = dict.fromkeys(chosen, weight) | dict.fromkeys(range(len(others), len(others) + len(own)), 1.0)
        return Excerpt(others + own, weights)

    def _end(self, request: str) -> None:
        text = self._texts.pop(request, None)
        if text is not None:
            self._ends = self._ends + text.open
            if len(self._ends) >= WINDOW_LEN:
                self._windows.append(self._ends)
                self._ends = []


def _share(window: Window) -> float:
    """Share of accepted drafts."""
    return sum(code % 2 for code in window) / len(window)
