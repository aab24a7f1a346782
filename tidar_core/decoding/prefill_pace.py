"""Paces the reading of prompts beside running requests.

How many prompt tokens may be read from one decode step to the next?

A long prompt is read in chunks, and every chunk delays the running requests. A chunk may take nearly as long as a
decode step, so that a gap stays below two steps. If more requests arrive than run, it may take longer by that factor. A
gap lasts from the end of one decode step to the end of the next, since a device may compute later.

A gap now and then has no chunk, so that the time of a bare step stays known. Where
even the shortest chunk takes much too long, chunks have a few tokens, since a prompt must not starve.
"""

from tidar_core.timing import Clock

__all__ = ["PrefillPace"]

FIRST_TOKENS = 64
"""Tokens of a chunk before any gap was measured."""
LEAST_ALONE, LEAST_BESIDE = 16, 1
"""Fewest tokens of a chunk that has a forward of its own, where fewer take nearly as long. The second number is for a
chunk in the forward of a decode step."""
LEAST_BEHIND, MISSED, BEYOND, SAVED = 4, 3, 1.5, 0.5
"""Behind many tokens, even the shortest chunk may take more than BEYOND times as long as it may, since it reads all
keys. After MISSED of these, chunks have LEAST_BEHIND tokens, unless the shortest one takes less than SAVED of their
time."""
RENEWED_EVERY, RENEWED_GAIN = 16, 0.5
"""Gaps with a chunk before one without, so that the time without a chunk stays known; and the share of that gap in the
mean."""
STEP_GAIN = 0.2
"""Share of a new gap in the mean gap without a chunk."""
CHUNK_STEPS = 0.85
"""Time that a chunk may take, in decode steps. Below 1, since times vary and a gap should stay below two steps."""
LARGEST_CHANGE = 2.0
"""Largest factor by which the next chunk is longer or shorter."""


class PrefillPace:
    """Length of the next chunk of one scheduler."""

    def __init__(self, most: int, clock: Clock, *, least: int = LEAST_ALONE) -> None:
        """most   most tokens of a chunk
        clock  seconds, ascending
        least  fewest tokens of a chunk, unless `most` is less
        """
        self._most, self._least, self._clock = most, min(least, most), clock
        self._tokens, self._floor = float(min(FIRST_TOKENS, most)), self._least
        self._chunks = self._missed = 0
        """Gaps with a chunk since one without, and shortest chunks that took too long, one after the other."""
        self._behind = 0.0
        """Time of the last chunk of at least LEAST_BEHIND tokens."""
        self._ended: float | None = None
        self._bare = 0.0
        """Mean gap between decode steps without a chunk; 0 if none was measured."""

    def tokens(self, running: int) -> int:
        """Most tokens of the next chunk beside so many running requests; 0 for a gap without a chunk."""
        if not running:
            return self._most
        return 0 if self._chunks == RENEWED_EVERY else int(self._tokens)

    def idle(self) -> None:
        """No request runs: the next gap is no gap between steps."""
        self._ended = None

    def step_ended(self, read: int, share: float) -> None:
        """Learn from the gap that ends now.

        read   prompt tokens that were read in it
        share  arriving requests over running requests
        """
        before, self._ended = self._ended, self._clock()
        if before is None:
            return
        gap = self._ended - before
        if read:
            self._chunks += 1
            if self._bare and 2 * read > self._tokens:
                self._chunk_ended(read, max(gap - self._bare, 1e-9), CHUNK_STEPS * self._bare * max(1.0, share))
            return
        renewed = self._chunks == RENEWED_EVERY
        if not renewed:  # no prompt is being read
            self._floor = self._least
        gain = RENEWED_GAIN if renewed else STEP_GAIN
        self._bare += (gain if self._bare else 1.0) * (gap - self._bare)
        self._chunks = 0

    def _chunk_ended(self, read: int, seconds: float, allowed: float) -> None:
        """Learn from the time that a chunk took."""
        if read >= LEAST_BEHIND:
            self._behind = seconds
        missed = read == self._least < LEAST_BEHIND and seconds > max(BEYOND * allowed, SAVED * self._behind)
        self._missed = self._missed + 1 if missed else 0
        if self._missed == MISSED:
            self._floor = LEAST_BEHIND
        self._tokens *= min(max(allowed / seconds, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
        self._tokens = min(max(self._tokens, self._floor), self._most)
