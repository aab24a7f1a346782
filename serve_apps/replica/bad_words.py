"""Which token sequences would say a word that must not be said?

In vLLM's way: the word as it stands without the spaces before it, and behind one space if that is another first token
and no more tokens. Only the tokenizer's own spelling of a word is meant: other tokens that join to the same text may
still come.
"""

from collections.abc import Callable, Sequence

from serve_apps.api.errors import ParameterError

__all__ = ["token_sequences"]


def token_sequences(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, once or twice; each sequence once. Raises ParameterError for
    a word without any.

    encode  text to token ids, nothing added
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare, spaced = (tuple(encode(prefix + word.lstrip())) for prefix in ("", " "))
        if not bare:
            raise ParameterError(f"bad_words holds {word!r}, which no token says; each needs one at least", "bad_words")
        sequences[bare] = None
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences[spaced] = None
    return tuple(sequences)
