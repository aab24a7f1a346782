"""Estimates how fast a decoder works, and how many tokens a request will take.

The decoder's thread measures both over its last forwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tidar_core.decoding.request import Request

__all__ = ["ThroughputEstimate"]

KEPT = 0.98
"""Decay per measurement: about the last fifty measurements count."""


@dataclass(slots=True)
class ThroughputEstimate:
    """Decayed sums over forwards and over finished texts. Tokens are prompt tokens and completion tokens."""

    forwards: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    texts: float = 0.0
    written: float = 0.0
    """Completion tokens of the finished texts."""

    def count(self, tokens: int, seconds: float) -> None:
        """Count a forward that read and wrote `tokens` tokens."""
        self.forwards = 1 + KEPT * self.forwards
        self.tokens = tokens + KEPT * self.tokens
        self.seconds = seconds + KEPT * self.seconds

    def count_text(self, tokens: int) -> None:
        """Count a finished text of `tokens` tokens."""
        self.texts = 1 + KEPT * self.texts
        self.written = tokens + KEPT * self.written

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens of a forward; 0 before the first forward."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def forwards_per_second(self) -> float:
        """Forwards per second of work, idle time excluded; 0 before the first forward."""
        return self.forwards / self.seconds if self.seconds else 0.0

    def expected(self, requests: Iterable[Request]) -> int:
        """Tokens expected of `requests`: their prompts, and completions of the usual length or of `max_tokens`."""
        usual = self.written / self.texts if self.texts else float("inf")
        return sum(len(r.prompt) + round(min(usual, r.sampling.max_tokens)) for r in requests)
