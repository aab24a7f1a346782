"""Origin of each token: accepted draft, correction, bonus or plain."""

import pytest

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.streaming.token_origins import origins
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
        ("a", 4, 1, 1, ["plain"]),  # drafts existed, and the forward verified none of them
        ("a", 1, 1, 4, ["plain"]),  # the mask tokens used as drafts were rejected
        ("a", 4, 1, 4, ["correction"]),
        ("abc", 4, 3, 4, ["draft", "draft", "correction"]),
        ("abcd", 4, 4, 4, ["draft", "draft", "draft", "bonus"]),
        ("ab", 2, 2, 4, ["draft", "bonus"]),  # all drafts were accepted
        ("ab", 4, 2, 2, ["draft", "bonus"]),  # all verified drafts were accepted
        ("ab", 4, 4, 4, ["draft", "draft"]),  # cut at the end of the text
    ],
)
def test_each_token_of_a_step_is_an_accepted_draft_or_the_token_after_the_drafts(
    tokens, pending, accepted, verified, expected
):
    assert origins(step(tokens, pending, accepted, verified)) == expected


def test_a_delta_of_several_steps_has_the_origin_of_each_token():
    tokenizer = train_bpe(["plain words"], 260)
    tokens = tokenizer.encode("ab日c")
    request = GenerationRequest(
        request_id="r", prompt="p: ", sampling=SamplingConfig(max_tokens=6), decoding=True, echo=True
    )
    detokenizer = IncrementalDetokenizer(tokenizer, request, tokenizer.encode("p: "), block_len=4)
    first = detokenizer.add([step(tokens[:1], 1, 0, 0)]).take()
    rest = detokenizer.add([step(tokens[1:4], 4, 3, 4), step(tokens[4:], 4, 2, 4, "length")]).take()
    assert (first.text, rest.text) == ("p: a", "b日c")
    assert first.decoding.model_dump() == {"forward": [0], "origin": ["plain"], "text_offset": [3]}
    assert rest.decoding.model_dump() == {
        "forward": [1, 1, 1, 2, 2],
        "origin": ["draft", "draft", "correction", "draft", "correction"],
        "text_offset": [4, 5, 5, 5, 6],  # a character of three tokens comes with the last of them
    }


def test_origins_are_absent_unless_requested():
    tokenizer = train_bpe(["plain words"], 260)
    request = GenerationRequest(request_id="r", prompt="p", sampling=SamplingConfig())
    detokenizer = IncrementalDetokenizer(tokenizer, request, tokenizer.encode("p"), block_len=4)
    assert detokenizer.add([step(tokenizer.encode("a"), 1, 0, 0)]).take().decoding is None
