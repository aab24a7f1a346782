"""Traffic of a decoding loop, and the time that it takes beside its decode steps.

How many seconds does the loop add to a step, how many does a token cost at prefill, and how long are texts?

Between two decode steps the loop settles requests, sends tokens and reads prompts. A gap is long when a prompt is
read or the process pauses. So the lower quartile of recent gaps stands for the loop's own time.
"""

from collections import deque

__all__ = ["LoopTime"]

RECENT_GAPS = 64
"""Gaps that count."""
DECAY = 0.999
"""Decay of old prefills with every decode step."""


class LoopTime:
    """Gaps, prefills and texts of one loop."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=RECENT_GAPS)
        self._prefill = self._tokens = self._texts = 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds from the end of a decode step to the plan of the next one, if nothing else is done between them."""
        return sorted(self._gaps)[len(self._gaps) // 4] if self._gaps else 0.0

    @property
    def token_seconds(self) -> float:
        """Seconds of prefill per new token: a property of the traffic, the same for every plan."""
        return self._prefill / self._tokens if self._tokens else 0.0

    def add_gap(self, seconds: float) -> None:
        """Count a gap between two decode steps of the same requests."""
        self._gaps.append(seconds)

    @property
    def texts_per_token(self) -> float:
        """Texts that ended, over new tokens: 1 over the mean length of a text."""
        return self._texts / self._tokens if self._tokens else 0.0

    def add_step(self, tokens: int, texts: int = 0) -> None:
        """Count the new tokens of a decode step, and the texts that ended with it."""
        self._prefill, self._tokens = DECAY * self._prefill, DECAY * self._tokens + tokens
        self._texts = DECAY * self._texts + texts

    def add_prefill(self, seconds: float) -> None:
        """Count a prefill."""
        self._prefill += seconds
