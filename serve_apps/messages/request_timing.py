"""How long did each part of a text take?

Marked by the decoder's thread, told when the text is complete.
"""

from dataclasses import dataclass

__all__ = ["RequestTiming", "TimingRecorder"]


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Of one text in its replica, in seconds."""

    queue: float
    """From when it was asked for until it had a row."""
    prefill: float
    """From then until its first token."""
    decode: float
    """From then until its last."""


@dataclass(slots=True)
class TimingRecorder:
    """When what happened to one text, by one clock."""

    asked: float | None = None
    begun: float | None = None
    first: float | None = None
    last: float | None = None

    def hear(self, now: float) -> None:
        """Tokens have come."""
        self.first, self.last = self.first or now, now

    @property
    def lap(self) -> RequestTiming | None:
        """Once tokens have come."""
        if self.asked is None or self.begun is None or self.first is None or self.last is None:
            return None
        return RequestTiming(self.begun - self.asked, self.first - self.begun, self.last - self.first)
