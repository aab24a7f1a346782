"""Responses from text deltas."""

import asyncio
import json

import pytest
from openai.types import Completion

from serve_apps.api.completion_response import ModelCard, metrics_of, usage_of
from serve_apps.api.errors import problem_of
from serve_apps.api.generation_fields import StreamOptions
from serve_apps.messages.text_delta import GenerationFailed, TextDelta, UsageCounts
from serve_apps.messages.token_scores import Logprobs, TokenScore
from serve_apps.streaming.completion_stream import DONE, CompletionReply, error_event, interleave
from tidar_core.errors import CapacityError

CARD = ModelCard(id="m", created=5, max_model_len=64, block_len=4, bundle_hash="0123456789abcdef", mode="single-pass")
USAGE = StreamOptions(include_usage=True)


@pytest.fixture
def reply():
    return CompletionReply(reply_id="cmpl-1", card=CARD, created=9)


def event_data(reply, index, piece):
    """Data of the only event of a delta."""
    (event,) = reply.events(index, piece)
    return data(event)


def data(event):
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))


def test_tallies_of_several_prompts_add_up():
    assert UsageCounts(1, 2, (3, 4)) + UsageCounts(10, 20, (30, 40)) == UsageCounts(11, 22, (33, 44))


def test_without_drafts_there_are_no_statistics_of_them():
    assert metrics_of(UsageCounts(1, 5, (4,))) is None
    no_decode_step = metrics_of(UsageCounts(1, 1, (0, 0))).speculative_decoding
    assert (no_decode_step.mean_acceptance_length, no_decode_step.draft_acceptance_rate) == (1.0, 0.0)


def test_a_body_is_a_completion_of_openai_with_a_choice_for_each_prompt(reply):
    pieces = [
        (1, TextDelta("", None, UsageCounts(2), fingerprint="012")),
        (0, TextDelta("he", None, UsageCounts(3), fingerprint="012")),
        (1, TextDelta("b", "stop", UsageCounts(2, 2, (1, 0)))),
        (0, TextDelta("y", "length", UsageCounts(3, 5, (0, 2)))),
    ]  # fmt: skip
    body = json.loads(json.dumps(reply.body(pieces)))
    read = Completion.model_validate(body, strict=True)
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in read.choices] == [
        (0, "hey", "length", None),
        (1, "b", "stop", None),
    ]
    assert (read.id, read.object, read.created, read.model) == ("cmpl-1", "text_completion", 9, "m")
    assert read.system_fingerprint == "012"
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (5, 7, 12)
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 3


def test_each_choice_names_its_weights_and_a_whole_response_names_all_weights(reply):
    assert event_data(reply, 0, TextDelta("a", None, UsageCounts(2), fingerprint="old"))["system_fingerprint"] == "old"
    assert event_data(reply, 1, TextDelta("b", None, UsageCounts(2), fingerprint="new"))["system_fingerprint"] == "new"
    assert event_data(reply, 0, TextDelta("c", "stop", UsageCounts(2)))["system_fingerprint"] == "old"
    assert data(reply.usage_event())["system_fingerprint"] == "old+new"


def test_a_prompt_is_paid_for_once_whatever_the_number_of_its_choices():
    reply = CompletionReply(reply_id="cmpl-1", card=CARD, n=2)
    for index in range(4):
        event_data(reply, index, TextDelta("a", "stop", UsageCounts(10, 1, cached_tokens=index + 1)))
    cached = {"prompt_tokens_details": {"cached_tokens": 1 + 3}}
    usage = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
    assert usage_of(reply.usage).model_dump() == usage | cached


def test_log_probabilities_of_all_pieces_join_and_keep_openais_shape(reply):
    one = Logprobs(text_offset=[0], token_logprobs=[None], tokens=["he"], top_logprobs=[None])
    two = Logprobs(text_offset=[2], token_logprobs=[-1.5], tokens=["y"], top_logprobs=[{"y": -1.5, "z": -2.0}])
    prompt = [None, {7: TokenScore(logprob=-2.0, rank=None, decoded_token="x")}]
    pieces = [
        (0, TextDelta("", None, UsageCounts(3))), (0, TextDelta("he", None, UsageCounts(3), None, one, prompt)),
        (0, TextDelta("y", "stop", UsageCounts(3, 2), "!", two)),
    ]  # fmt: skip
    body = json.loads(json.dumps(reply.body(pieces)))
    (choice,) = Completion.construct(**body).choices  # as the client does; its types know of no null, its server does
    assert choice.logprobs.to_dict() == {
        "text_offset": [0, 2], "token_logprobs": [None, -1.5], "tokens": ["he", "y"],
        "top_logprobs": [None, {"y": -1.5, "z": -2.0}],
    }  # fmt: skip
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hey", "stop", "!")
    assert choice.prompt_logprobs == [None, {"7": {"logprob": -2.0, "rank": None, "decoded_token": "x"}}]
    assert (one.tokens, two.tokens) == (["he"], ["y"])


def test_a_chunk_has_the_delta_and_no_usage_unless_requested(reply):
    chunk = event_data(reply, 0, TextDelta("he", None, UsageCounts(3, 1)))
    assert chunk["choices"] == [{"index": 0, "text": "he", "logprobs": None, "finish_reason": None,
                                 "stop_reason": None, "prompt_logprobs": None, "prompt_token_ids": None,
                                 "token_ids": None, "decoding": None}]  # fmt: skip
    assert "usage" not in chunk
    assert "metrics" not in chunk
    assert event_data(reply, 0, TextDelta("", "stop", UsageCounts(3, 2)))["choices"][0]["finish_reason"] == "stop"


def test_a_piece_without_news_is_no_chunk(reply):
    assert list(reply.events(0, TextDelta("", None, UsageCounts(3)))) == []


def test_with_include_usage_the_last_chunk_alone_has_it(reply):
    reply.options = USAGE
    assert event_data(reply, 0, TextDelta("he", None, UsageCounts(3, 1, (0, 0))))["usage"] is None
    event_data(reply, 1, TextDelta("x", "stop", UsageCounts(1, 4, (1, 1))))
    event_data(reply, 0, TextDelta("y", "length", UsageCounts(3, 2, (1, 0))))
    last = data(reply.usage_event())
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert last["metrics"]["speculative_decoding"]["acceptance_histogram"] == [2, 1]
    Completion.model_validate(last, strict=False)


def test_continuous_usage_counts_the_tokens_so_far(reply):
    reply.options = StreamOptions(continuous_usage_stats=True)
    assert event_data(reply, 0, TextDelta("he", None, UsageCounts(3, 4)))["usage"]["completion_tokens"] == 4


def test_the_ids_of_all_pieces_join(reply):
    pieces = [
        (0, TextDelta("", None, UsageCounts(3), prompt_token_ids=(7, 8, 9))),
        (0, TextDelta("he", None, UsageCounts(3, 1), token_ids=(4,))),
        (0, TextDelta("y", "stop", UsageCounts(3, 3), token_ids=(5, 6))),
    ]
    (choice,) = reply.body(pieces)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([7, 8, 9], [4, 5, 6])


def test_an_error_in_a_stream_is_openais_envelope():
    assert data(error_event(problem_of(CapacityError("full"))))["error"]["code"] == "rate_limit_exceeded"
    assert DONE == "data: [DONE]\n\n"


class Source:
    """Source of events that records whether it was closed."""

    def __init__(self, *events, forever=False):
        self.events, self.forever, self.closed = events, forever, False

    async def run(self):
        try:
            for event in self.events:
                yield event
                await asyncio.sleep(0)
            if self.forever:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def gather(*sources):
    try:
        return [item async for item in interleave([source.run() for source in sources])]
    finally:
        assert all(source.closed for source in sources)


def test_interleaved_sources_give_all_their_pieces_in_order():
    a, b = TextDelta("a", None, UsageCounts()), TextDelta("b", "stop", UsageCounts())
    items = asyncio.run(gather(Source(a, a, b), Source(b), Source(a, b)))
    assert sorted(items, key=lambda item: item[0]) == [(0, a), (0, a), (0, b), (1, b), (2, a), (2, b)]


@pytest.mark.parametrize("last", [GenerationFailed(CapacityError("full")), TextDelta("b", None, UsageCounts())])
def test_the_first_failure_closes_the_other_sources(last):
    endless = Source(TextDelta("a", None, UsageCounts()), forever=True)
    with pytest.raises((CapacityError, AssertionError)):
        asyncio.run(gather(endless, Source(last)))


def test_who_stops_listening_closes_the_sources():
    endless = Source(TextDelta("a", None, UsageCounts()), forever=True)

    async def listen():
        pieces = interleave([endless.run()])
        await anext(pieces)
        await pieces.aclose()
        assert endless.closed

    asyncio.run(listen())
