"""Durations of the phases of one request. The decoder's thread records them; the last delta carries them."""

from dataclasses import dataclass

__all__ = ["RequestTiming", "TimingRecorder"]


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Durations of one text in its replica, in seconds."""

    queue: float
    """Time from the request until it had a slot."""
    prefill: float
    """Time from there to the first token."""
    decode: float
    """Time from the first to the last token."""


@dataclass(slots=True)
class TimingRecorder:
    """Times of the events of one request, by one clock."""

    requested: float | None = None
    begun: float | None = None
    first: float | None = None
    last: float | None = None

    def record_tokens(self, now: float) -> None:
        """Record that tokens have come."""
        self.first, self.last = self.first or now, now

    @property
    def timing(self) -> RequestTiming | None:
        """Durations so far; None before the first token."""
        if self.requested is None or self.begun is None or self.first is None or self.last is None:
            return None
        return RequestTiming(self.begun - self.requested, self.first - self.begun, self.last - self.first)
