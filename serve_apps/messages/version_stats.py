"""How has one version of a model done?"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

from serve_apps.messages.text_delta import UsageCounts

__all__ = ["Since", "VersionReport", "VersionStats"]


@dataclass(slots=True)
class VersionStats:
    """Of the texts that a version has written at one replica, or at several together."""

    texts: int = 0
    """Written to their ends."""
    errors: int = 0
    """Texts that the server failed to write."""
    refused: int = 0
    """Texts that could not be asked for in that way, or not then."""
    aborted: int = 0
    """Texts that the client did not wait for."""
    tokens: int = 0
    forwards: int = 0
    """Forwards that gave a text tokens, counted for each text."""
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    """From a text's arrival to its end, over all that were written to their ends."""
    first_seconds: float = 0.0
    """From a text's arrival to its first token, over all that had one."""
    firsts: int = 0
    """Texts that had a first token."""
    plain_tokens: int = 0
    """Of texts that were to be written without drafts: a forward each, which says nothing about a version."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def count_first(self, seconds: float) -> None:
        """A text has its first token, so long after it was asked for."""
        self.firsts += 1
        self.first_seconds += seconds

    def count(self, outcome: str, tally: UsageCounts, seconds: float) -> None:
        """A text has ended, so long after it was asked for.

        outcome  `texts`, `errors`, `refused` or `aborted`, as the fields are called
        """
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.seconds += seconds if outcome == "texts" else 0.0
        self.tokens += tally.completion_tokens
        if (metrics := tally.metrics()) is not None:
            drafts = metrics.speculative_decoding
            self.drafts += drafts.num_spec_steps
            self.draft_tokens += drafts.num_draft_tokens
            self.accepted_tokens += drafts.num_accepted_draft_tokens

    @property
    def tokens_per_forward(self) -> float:
        """Of texts that may be drafted. 1 is autoregressive; 0 before the first forward."""
        forwards = self.forwards - self.plain_tokens
        return (self.tokens - self.plain_tokens) / forwards if forwards > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionReport:
    """One version at one replica."""

    replica: str
    version: str
    """What logs and metrics call it."""
    fingerprint: str
    bundle_hash: str
    state: str
    """`champion`, `challenger`, `loading`, `leaving` while it ends its last texts, `failed` to load, or `gone`."""
    problem: str
    """Why it failed to load; empty if it did not."""
    totals: VersionStats


class Since:
    """Totals over all replicas since a moment, those that have died included."""

    def __init__(self, reports: Iterable[VersionReport]) -> None:
        """reports  of that moment"""
        self._then = {(report.replica, report.bundle_hash): report.totals for report in reports}
        self._now = dict(self._then)

    def hear(self, reports: Iterable[VersionReport]) -> None:
        """Take in later reports."""
        self._now |= {(report.replica, report.bundle_hash): report.totals for report in reports}

    def totals(self, bundle_hash: str) -> VersionStats:
        """Of one version."""
        grown = (now - self._then.get(key, VersionStats()) for key, now in self._now.items() if key[1] == bundle_hash)
        return sum(grown, VersionStats())
