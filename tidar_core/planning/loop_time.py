"""Time that a decoding loop takes beside its decode steps.

How many seconds does the loop add to a step, and how many does a token cost at prefill?

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
    """Gaps and prefills of one loop."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=RECENT_GAPS)
        self._prefill = self._tokens = 0.0

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

    def add_step(self, tokens: int) -> None:
        """Count the new tokens of a decode step."""
        self._prefill, self._tokens = DECAY * self._prefill, DECAY * self._tokens + tokens

    def add_prefill(self, seconds: float) -> None:
        """Count a prefill."""
        self._prefill += seconds
