"""Encoding of a text that is too long to be encoded at once; the ids equal the ids of the whole text.

The text is encoded in parts. Each cut between two parts must be proven with the text around it, encoded across the
cut. There must be a token border at the cut. The tokens before it must equal the last tokens of the part.
"""

from collections.abc import Iterator
from itertools import chain, islice

from tidar_core.artifacts.text.tokenizer import Tokenizer

__all__ = ["encode_long"]

WINDOW = 4096
"""Characters on each side of a cut that are encoded to prove it."""
TRIES = 8
"""Cuts of each kind that are tried at the end of a part before the part is extended."""


def encode_long(tokenizer: Tokenizer, text: str, part_len: int) -> Iterator[list[int]]:
    """The ids of `text` in parts of about `part_len` characters. A part without a proven cut grows."""
    known: list[int] = []  # ids of the window before `begin`; they precede the ids of the next part
    begin, end = 0, part_len
    while end + WINDOW < len(text):
        for cut in _cuts(text, end):
            window = tokenizer.encode(text[cut - WINDOW : cut])
            if tokenizer.encode(text[cut - WINDOW : cut + WINDOW])[: len(window)] != window:
                continue
            ids = _ids_after(tokenizer, text[max(0, begin - WINDOW) : cut], known)
            proven = window[len(window) // 2 :]
            if ids[-len(proven) :] == proven:
                yield ids
                begin, known, end = cut, window, cut
                break
        end += part_len
    yield _ids_after(tokenizer, text[max(0, begin - WINDOW) :], known)


def _ids_after(tokenizer: Tokenizer, text: str, known: list[int]) -> list[int]:
    ids = tokenizer.encode(text)
    assert ids[: len(known)] == known, "a proven cut is not a token border"
    return ids[len(known) :]


def _cuts(text: str, end: int) -> Iterator[int]:
    """Cuts to try at or before `end`: first those before the space of a word, where tokens of all kinds begin."""
    positions = range(end, end - WINDOW, -1)
    words = (position for position in positions if text[position] == " " and text[position - 1].isalnum())
    lines = (position for position in positions if text[position - 1] == "\n" and not text[position].isspace())
    return chain(islice(words, TRIES), islice(lines, TRIES), islice(positions, TRIES))
