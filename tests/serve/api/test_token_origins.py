"""Which tokens were drafts that stood, and which the model said itself."""

import pytest

from serve_apps.api.token_origins import origins
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep


def step(tokens, pending, accepted, verified, reason=None):
    return DecodeStep("r", tuple(tokens), reason, pending, accepted, verified)


@pytest.mark.parametrize(
    ("tokens", "pending", "accepted", "verified", "expected"),
    [
        ("a", 1, 0, 0, ["plain"]),  # a prefill
        ("a", 1, 1, 1, ["plain"]),  # an autoregressive step
        ("a", 4, 1, 1, ["plain"]),  # drafts were there, and none was read
        ("a", 1, 1, 4, ["plain"]),  # what stood in for drafts fell
        ("a", 4, 1, 4, ["correction"]),
        ("abc", 4, 3, 4, ["draft", "draft", "correction"]),
        ("abcd", 4, 4, 4, ["draft", "draft", "draft", "bonus"]),
        ("ab", 2, 2, 4, ["draft", "bonus"]),  # all that had been drafted
        ("ab", 4, 2, 2, ["draft", "bonus"]),  # all that was read
        ("ab", 4, 4, 4, ["draft", "draft"]),  # cut at the end of the text
    ],
)
def test_each_token_of_a_step_is_a_draft_that_stood_or_the_word_after_them(
    tokens, pending, accepted, verified, expected
):
    assert origins(step(tokens, pending, accepted, verified)) == expected


def test_a_piece_of_several_steps_still_says_it_of_each_token():
    tokenizer = train_bpe(["plain words"], 260)
    tokens = tokenizer.encode("ab日c")
    request = GenerationRequest(
        request_id="r", prompt="p: ", sampling=SamplingConfig(max_tokens=6), decoding=True, echo=True
    )
    transcript = IncrementalDetokenizer(tokenizer, request, tokenizer.encode("p: "), block_len=4)
    first = transcript.add([step(tokens[:1], 1, 0, 0)]).take()
    rest = transcript.add([step(tokens[1:4], 4, 3, 4), step(tokens[4:], 4, 2, 4, "length")]).take()
    assert (first.text, rest.text) == ("p: a", "b日c")
    assert first.decoding.model_dump() == {"forward": [0], "origin": ["plain"], "text_offset": [3]}
    assert rest.decoding.model_dump() == {
        "forward": [1, 1, 1, 2, 2],
        "origin": ["draft", "draft", "correction", "draft", "correction"],
        "text_offset": [4, 5, 5, 5, 6],  # a character of three tokens comes with the last of them
    }


def test_who_does_not_ask_is_not_told():
    tokenizer = train_bpe(["plain words"], 260)
    request = GenerationRequest(request_id="r", prompt="p", sampling=SamplingConfig())
    transcript = IncrementalDetokenizer(tokenizer, request, tokenizer.encode("p"), block_len=4)
    assert transcript.add([step(tokenizer.encode("a"), 1, 0, 0)]).take().decoding is None
