"""Log probabilities in the form of the responses."""

import pytest

from serve_apps.streaming.logprobs import ScoreSheet, prompt_scores, score_models
from tidar_core.decoding.request import TokenLogprob

NAMES = {1: "a", 2: "b", 3: "c", 4: "b"}
SCORED = TokenLogprob(3, -5.0, ((1, -0.25), (2, -1.5), (4, -2.5)))


def sheet(top):
    sheet = ScoreSheet(NAMES.__getitem__, top)
    sheet.add(3, SCORED, 0, 2)
    sheet.add(1, None, 2, 3)
    return sheet


@pytest.mark.parametrize(
    ("top", "likeliest"),
    [
        (0, {"c": -5.0}),
        (1, {"a": -0.25, "c": -5.0}),
        (3, {"a": -0.25, "b": -1.5, "c": -5.0}),  # of the two called b, the likelier
    ],
)
def test_the_likeliest_tokens_come_by_name_and_the_token_itself_beside_them(top, likeliest):
    assert sheet(top).take(None).top_logprobs == [likeliest, None]


def test_a_token_is_taken_once_its_text_is_sent():
    scores = sheet(0)
    assert scores.take(1).tokens == []
    assert (taken := scores.take(2)).tokens == ["c"]
    assert (taken.text_offset, taken.token_logprobs) == ([0], [-5.0])
    assert scores.take(None).tokens == ["a"]


def test_minus_infinity_is_a_number_that_json_has():
    scores = ScoreSheet(NAMES.__getitem__, 0)
    scores.add(1, TokenLogprob(1, float("-inf"), ()), 0, 1)
    assert scores.take(None).token_logprobs == [-9999.0]


def test_prompt_scores_are_by_token_id_with_their_ranks():
    none, entry = score_models(prompt_scores([SCORED], 1, NAMES.__getitem__))
    assert none is None
    assert {token: (score.logprob, score.rank, score.decoded_token) for token, score in entry.items()} == {
        3: (-5.0, None, "c"),
        1: (-0.25, 1, "a"),
    }


def test_every_token_has_a_name_of_its_own(tokenizer):
    spelled = [tokenizer.spell(token) for token in range(tokenizer.vocab_len)]
    assert len(set(spelled)) == tokenizer.vocab_len
    assert spelled[tokenizer.eos_id] == "<|endoftext|>"
    assert [tokenizer.spell(token) for token in tokenizer.encode("aé")] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
    assert not any("\N{REPLACEMENT CHARACTER}" in name for name in spelled)
