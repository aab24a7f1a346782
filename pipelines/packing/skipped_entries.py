"""Which rows of a corpus cannot be used, and why?

One such row among a million does not end a job: it is counted, and the first rows are named with their reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["LeftOut"]

MOST_NAMED = 3
"""Rows of a unit, and of a source, by name."""


@dataclass(slots=True)
class LeftOut:
    """Rows that cannot be used; as text, the first by name and the number of the others."""

    rows: int = 0
    named: list[str] = field(default_factory=list)
    """The first, each with its place and reason."""

    def add(self, place: Callable[[], str], reason: object) -> None:
        """Count a row. Its place costs a look into the file, so it is only found for rows that are named."""
        self.rows += 1
        if len(self.named) < MOST_NAMED:
            self.named.append(f"{place()} {reason}")

    def __str__(self) -> str:
        named = self.named[:MOST_NAMED]
        more = [f"and {self.rows - len(named)} more"] if self.rows > len(named) else []
        return "; ".join(named + more)
