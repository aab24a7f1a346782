"""Terminal output for people: standard output and error, and figures in few digits.

A line in a log, where the output is no terminal, is never cut or wrapped: only a terminal has a width.
"""

from rich.console import Console, ConsoleDimensions

__all__ = ["PeopleConsole", "figure", "size", "stderr", "stdout"]

LOG_COLUMNS = 100_000
"""Columns of an output that is no terminal: more than any line has."""


class PeopleConsole(Console):
    """A rich console that is as wide as its terminal, and in a log as wide as its lines."""

    @property
    def size(self) -> ConsoleDimensions:  # pyrefly: ignore[bad-override]
        """Columns and lines."""
        return super().size if self.is_terminal else ConsoleDimensions(LOG_COLUMNS, 25)


stdout = PeopleConsole()
stderr = PeopleConsole(stderr=True)


def figure(value: float) -> str:
    """A number in four significant digits; every digit of an integer and of the whole part of a large number."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in GiB, or in MiB if they are fewer than one GiB."""
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"
