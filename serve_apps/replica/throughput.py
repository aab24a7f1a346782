"""How fast does a decoder work, and how much is it to expect of a request?

Measured over its last forwards, by its own thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tidar_core.decoding.request import Request

__all__ = ["ThroughputEstimate"]

KEPT = 0.98
"""Of the weight of a measurement, after the next one: what counts are the last fifty or so."""


@dataclass(slots=True)
class ThroughputEstimate:
    """Tokens are those of prompts read and of texts written, over all texts together."""

    forwards: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    texts: float = 0.0
    written: float = 0.0
    """Tokens of those texts."""

    def count(self, tokens: int, seconds: float) -> None:
        """A forward has read and written so much."""
        self.forwards = 1 + KEPT * self.forwards
        self.tokens = tokens + KEPT * self.tokens
        self.seconds = seconds + KEPT * self.seconds

    def count_text(self, tokens: int) -> None:
        """A text has come to its end."""
        self.texts = 1 + KEPT * self.texts
        self.written = tokens + KEPT * self.written

    @property
    def tokens_per_forward(self) -> float:
        """0 before the first forward."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def forwards_per_second(self) -> float:
        """While there is anything to do; 0 before the first forward."""
        return self.forwards / self.seconds if self.seconds else 0.0

    def expected(self, requests: Iterable[Request]) -> int:
        """Tokens of their prompts, and of texts as long as texts are, or as they may be."""
        usual = self.written / self.texts if self.texts else float("inf")
        return sum(len(r.prompt) + round(min(usual, r.sampling.max_tokens)) for r in requests)
