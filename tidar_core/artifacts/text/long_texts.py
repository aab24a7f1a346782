"""Token ids of a text that is too long to be encoded at once, the same as those of the whole.

The text is encoded in parts. A cut must be proven: the text around it, encoded across the cut, has a border there and
the same tokens before it as the part that ends there.
"""

from collections.abc import Iterator
from itertools import chain, islice

from tidar_core.artifacts.text.tokenizer import Tokenizer

__all__ = ["encode_long"]

WINDOW = 4096
"""Characters on each side of a cut that prove it."""
TRIES = 8
"""Cuts of each kind that are tried at the end of a part, before the part is made longer."""


def encode_long(tokenizer: Tokenizer, text: str, part_len: int) -> Iterator[list[int]]:
    """The ids of `text` in parts of about `part_len` characters, or of several times that where no cut is proven."""
    known: list[int] = []  # ids of the window before `begin`, which the next part has before its own
    begin, end = 0, part_len
    while end + WINDOW < len(text):
        for cut in _cuts(text, end):
            window = tokenizer.encode(text[cut - WINDOW : cut])
            if tokenizer.encode(text[cut - WINDOW : cut + WINDOW])[: len(window)] != window:
                continue
            ids = _ids_behind(tokenizer, text[max(0, begin - WINDOW) : cut], known)
            proven = window[len(window) // 2 :]
            if ids[-len(proven) :] == proven:
                yield ids
                begin, known, end = cut, window, cut
                break
        end += part_len
    yield _ids_behind(tokenizer, text[max(0, begin - WINDOW) :], known)


def _ids_behind(tokenizer: Tokenizer, text: str, known: list[int]) -> list[int]:
    ids = tokenizer.encode(text)
    assert ids[: len(known)] == known, "a cut was proven that is none"
    return ids[len(known) :]


def _cuts(text: str, end: int) -> Iterator[int]:
    """Places at or before `end`, most of all those before the space of a word, where tokens of all kinds begin."""
    places = range(end, end - WINDOW, -1)
    words = (place for place in places if text[place] == " " and text[place - 1].isalnum())
    lines = (place for place in places if text[place - 1] == "\n" and not text[place].isspace())
    return chain(islice(words, TRIES), islice(lines, TRIES), islice(places, TRIES))
