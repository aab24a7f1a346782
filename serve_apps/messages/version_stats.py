"""Counts of the texts that one model version generated."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

from serve_apps.messages.text_delta import UsageCounts

__all__ = ["Since", "VersionReport", "VersionStats"]


@dataclass(slots=True)
class VersionStats:
    """Counts of one version at one replica, or at several replicas together."""

    texts: int = 0
    """Texts generated to their end."""
    errors: int = 0
    """Texts that failed by an error of the server."""
    refused: int = 0
    """Texts refused for a wrong request or a lack of capacity."""
    aborted: int = 0
    """Texts whose client left before the end."""
    tokens: int = 0
    forwards: int = 0
    """Forwards that gave a text tokens, counted for each text."""
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    """Sum of the times from arrival to end, over `texts`."""
    first_seconds: float = 0.0
    """Sum of the times from arrival to first token, over `firsts`."""
    firsts: int = 0
    """Texts that had a first token."""
    plain_tokens: int = 0
    """Tokens of texts that were requested without drafts. Each takes one forward, whatever the version."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def count_first(self, seconds: float) -> None:
        """Count the first token of a text, `seconds` after its arrival."""
        self.firsts += 1
        self.first_seconds += seconds

    def count(self, outcome: str, usage: UsageCounts, seconds: float) -> None:
        """Count the end of a text, `seconds` after its arrival.

        outcome  name of a field: `texts`, `errors`, `refused` or `aborted`
        """
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.seconds += seconds if outcome == "texts" else 0.0
        self.tokens += usage.completion_tokens
        if usage.drafts_per_step:
            self.drafts += usage.decode_steps
            self.draft_tokens += usage.drafted_tokens
            self.accepted_tokens += usage.accepted_tokens

    @property
    def tokens_per_forward(self) -> float:
        """Mean over texts with drafts. 1 means autoregressive; 0 before the first forward."""
        forwards = self.forwards - self.plain_tokens
        return (self.tokens - self.plain_tokens) / forwards if forwards > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionReport:
    """State and counts of one version at one replica."""

    replica: str
    version: str
    """Label of the version in logs and metrics."""
    fingerprint: str
    bundle_hash: str
    state: str
    """`champion`, `challenger`, `loading`, `leaving` while its last texts end, `failed` to load, or `gone`."""
    problem: str
    """Error of a version that failed to load; otherwise empty."""
    totals: VersionStats


class Since:
    """Counts over all replicas since a moment. Replicas that have died since are included."""

    def __init__(self, reports: Iterable[VersionReport]) -> None:
        """reports  reports of that moment"""
        self._then = {(report.replica, report.bundle_hash): report.totals for report in reports}
        self._now = dict(self._then)

    def update(self, reports: Iterable[VersionReport]) -> None:
        """Add later reports."""
        self._now |= {(report.replica, report.bundle_hash): report.totals for report in reports}

    def totals(self, bundle_hash: str) -> VersionStats:
        """Counts of one version."""
        grown = (now - self._then.get(key, VersionStats()) for key, now in self._now.items() if key[1] == bundle_hash)
        return sum(grown, VersionStats())
