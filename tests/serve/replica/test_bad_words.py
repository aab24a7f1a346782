"""Bad words in tokens."""

import pytest

from serve_apps.api.errors import ParameterError
from serve_apps.replica.bad_words import token_sequences

VOCABULARY = {"cat": (1,), " cat": (2,), "xylo": (3, 4), " xylo": (5, 3, 4), "!": (6,), " !": (6,), "": ()}


@pytest.mark.parametrize(
    ("words", "sequences"),
    [
        ([], ()),
        (["cat"], ((1,), (2,))),  # at the beginning of a text, and behind a space
        ([" cat"], ((1,), (2,))),
        (["xylo"], ((3, 4),)),  # behind a space it is longer, and ends alike
        (["!"], ((6,),)),
        (["cat", " cat", "!"], ((1,), (2,), (6,))),
    ],
)
def test_a_word_is_banned_with_and_without_a_space_before_it_as_in_vllm(words, sequences):
    assert token_sequences(words, VOCABULARY.__getitem__) == sequences


def test_a_word_without_tokens_is_refused():
    with pytest.raises(ParameterError) as caught:
        token_sequences([" "], {"": (), " ": ()}.__getitem__)
    assert caught.value.param == "bad_words"
