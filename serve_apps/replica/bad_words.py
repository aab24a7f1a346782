"""The token sequences that spell a bad word.

As in vLLM, a word has two spellings: the word without its leading spaces, and the word behind one space. The second
counts if it has another first token and as many tokens. Only the tokenizer's own spelling of a word is forbidden: other
tokens that join to the same text may still come.
"""

from collections.abc import Callable, Sequence

from serve_apps.api.errors import ParameterError

__all__ = ["token_sequences"]


def token_sequences(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word in its one or two spellings, without repetition. Raises ParameterError for a word without
    tokens.

    encode  text to token ids, nothing added
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare, spaced = (tuple(encode(prefix + word.lstrip())) for prefix in ("", " "))
        if not bare:
            raise ParameterError(
                f"bad_words holds {word!r}, which has no token; each word needs at least one", "bad_words"
            )
        sequences[bare] = None
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences[spaced] = None
    return tuple(sequences)
