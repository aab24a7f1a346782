"""Finds the end of a text that stops at certain strings.

The text ends at the first stop string that is complete; where several are complete with the same character, at the
longest. So the end depends on the text alone, not on its division into tokens or chunks. A part of the text is
released as soon as no stop string can begin in it, and no sooner.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

__all__ = ["StopStrings", "stop_tokens"]


def stop_tokens(strings: Sequence[str], special_ids: Mapping[str, int]) -> dict[int, str]:
    """Special tokens whose names are stop strings: they end a text too, for most texts do not show such names."""
    return {special_ids[string]: string for string in strings if string in special_ids}


class StopStrings:
    """The stop strings of one text, which arrives in chunks."""

    def __init__(self, strings: Sequence[str] = (), *, include: bool = False) -> None:
        """strings  the stop strings; none may be empty
        include  the string that ends the text is part of it
        """
        assert all(strings), "an empty string ends every text before it begins"
        self.found: str | None = None
        """The string that ended the text."""
        self._searches = [_Search(string) for string in strings]
        self._include = include
        self._held = ""

    def push(self, text: str, *, looked_for: bool = True) -> str:
        """Add a chunk; returns the text that is certain now, up to the stop string where `found` is set.

        looked_for  False: strings that are complete within this chunk do not end the text, though a string may begin
                    here
        """
        assert self.found is None, "the text has ended"
        if not self._searches:
            return text
        known = self._held + text
        for length, char in enumerate(text, len(self._held) + 1):
            complete = [search.string for search in self._searches if search.push(char)]
            if complete and looked_for:
                self.found, self._held = max(complete, key=len), ""
                return known[: length if self._include else length - len(self.found)]
        held_len = max((search.matched for search in self._searches), default=0)
        certain_len = len(known) if self._include else len(known) - held_len
        self._held = known[certain_len:]
        return known[:certain_len]

    def flush(self) -> str:
        """The rest of a text that has ended without a stop string."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Search for one string, one character at a time (Knuth, Morris, Pratt 1977)."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        """Characters of the string, not all, that the text ends with now."""
        self._borders = _borders(string)

    def push(self, char: str) -> bool:
        """Whether the text ends with the string now."""
        self.matched = self._longest(self.matched, char)
        if self.matched < len(self.string):
            return False
        self.matched = self._borders[-1]
        return True

    def _longest(self, matched: int, char: str) -> int:
        return _longest(self.string, self._borders, matched, char)


@lru_cache(maxsize=1024)
def _borders(string: str) -> list[int]:
    """At index i, the longest proper prefix of the string that its first i + 1 characters end with.

    Cached for all choices of a request, since long stop strings would otherwise occupy its process for long.
    """
    borders = [0]
    for char in string[1:]:
        borders.append(_longest(string, borders, borders[-1], char))
    return borders


def _longest(string: str, borders: Sequence[int], matched: int, char: str) -> int:
    while matched and string[matched] != char:
        matched = borders[matched - 1]
    return matched + (string[matched] == char)
