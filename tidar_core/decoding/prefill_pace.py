"""Paces the reading of prompts beside running requests.

How much of a prompt may be read from one decode step to the next?

A long prompt is read in chunks, and every chunk delays the running requests. A chunk may take nearly as long as a
decode step, so that a gap stays below two steps. If more requests arrive than run, it may take longer by that factor. A
gap lasts from the end of one decode step to the end of the next, since a device may compute later.

Behind many tokens, a chunk of one token takes nearly as long as one of 16: both read all keys. So a chunk has 16 tokens
at least. Where that is too much for one gap, it passes some of the layers in each of several gaps. The same idea for
other reasons: "From Tokens to Layers" (arXiv 2510.08055).

A gap now and then has no chunk, so that the time of a bare step stays known.
"""

from math import ceil

from tidar_core.timing import Clock

__all__ = ["PrefillPace"]

FIRST_TOKENS = 64
"""Tokens that pass all layers in a gap, before any gap was measured."""
LEAST_TOKENS = 16
"""Fewest tokens of a chunk; fewer take nearly as long."""
RENEWED_EVERY, RENEWED_GAIN = 16, 0.5
"""Gaps with a chunk before one without, so that the time without a chunk stays known; and the share of that gap in the
mean."""
STEP_GAIN = 0.2
"""Share of a new gap in the mean gap without a chunk."""
CHUNK_STEPS = 0.85
"""Time that a chunk may take, in decode steps. Below 1, since times vary and a gap should stay below two steps."""
SLACK = 1.1
"""How much more than planned the last layers of a chunk may be."""
LARGEST_CHANGE = 2.0
"""Largest factor by which the next gap has more or fewer tokens."""


class PrefillPace:
    """Length of the next chunk of one scheduler, and the layers that a chunk passes in the next gap.

    A gap has at least one layer for LEAST_TOKENS tokens, even where that takes too long: a prompt must not starve.
    """

    def __init__(self, most: int, clock: Clock, *, depth: int = 1) -> None:
        """most   most tokens of a chunk
        clock  seconds, ascending
        depth  layers, each of which a chunk may pass in another gap; 1 where it passes all of them in one
        """
        self._most, self._depth, self._clock = most, depth, clock
        self._work, self._least = float(min(FIRST_TOKENS, most) * depth), min(LEAST_TOKENS, most)
        """Tokens times layers that a gap may have, and the least."""
        self._chunks = 0
        """Gaps with a chunk since one without."""
        self._ended: float | None = None
        self._bare = 0.0
        """Mean gap between decode steps without a chunk; 0 if none was measured."""

    def tokens(self, running: int) -> int:
        """Most tokens of the next chunk beside so many running requests; 0 for a gap without a chunk."""
        if not running:
            return self._most
        if self._chunks >= RENEWED_EVERY:
            return 0
        layers = self._even(self._depth, LEAST_TOKENS)
        return min(int(self._work / layers), self._most)

    def layers(self, tokens: int, left: int) -> int:
        """Layers that a chunk passes in the next gap; 0 for a gap without a chunk.

        tokens  tokens of the chunk
        left    layers that it has not passed, 1..depth
        """
        if self._chunks >= RENEWED_EVERY:
            return 0
        return self._even(left, tokens / SLACK)

    def idle(self) -> None:
        """No request runs: the next gap is no gap between steps."""
        self._ended = None

    def step_ended(self, read: int, share: float) -> None:
        """Learn from the gap that ends now.

        read   prompt tokens of the gap, times the layers that they passed
        share  arriving requests over running requests
        """
        before, self._ended = self._ended, self._clock()
        if before is None:
            return
        gap = self._ended - before
        if not read:
            gain = RENEWED_GAIN if self._chunks >= RENEWED_EVERY else STEP_GAIN
            self._bare += (gain if self._bare else 1.0) * (gap - self._bare)
            self._chunks = 0
            return
        self._chunks += 1
        if self._bare and 2 * read > self._work:
            work = read * CHUNK_STEPS * self._bare * max(1.0, share) / max(gap - self._bare, 1e-9)
            work = min(max(work, self._work / LARGEST_CHANGE), self._work * LARGEST_CHANGE)
            self._work = min(max(work, self._least), self._most * self._depth)

    def _even(self, layers: int, tokens: float) -> int:
        """Layers in the next gap, where so many tokens pass `layers` layers in as few gaps as may be, evenly."""
        most = max(1, int(self._work / tokens))
        return ceil(layers / ceil(layers / most))
