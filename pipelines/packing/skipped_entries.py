"""Count and causes of the corpus entries that cannot be used.

One such entry among a million does not end a job: it is counted, and the first entries are named with their causes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["LeftOut"]

MOST_NAMED = 3
"""Entries that are named, of a unit and of a source."""


@dataclass(slots=True)
class LeftOut:
    """Entries that cannot be used; as text, the first by name and the number of the others."""

    rows: int = 0
    named: list[str] = field(default_factory=list)
    """The first entries, each with its place and cause."""

    def add(self, place: Callable[[], str], reason: object) -> None:
        """Count an entry. Finding its place reads the file, so it is found only for entries that are named."""
        self.rows += 1
        if len(self.named) < MOST_NAMED:
            self.named.append(f"{place()} {reason}")

    def __str__(self) -> str:
        named = self.named[:MOST_NAMED]
        more = [f"and {self.rows - len(named)} more"] if self.rows > len(named) else []
        return "; ".join(named + more)
