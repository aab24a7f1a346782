"""Messages from text deltas: a stream joins to the whole message."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_apps.api.completion_response import ModelCard
from serve_apps.api.generation_fields import StreamOptions
from serve_apps.messages.generation_request import ToolUse
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import ChatTokenLogprob
from serve_apps.streaming.chat_stream import ChatReply

CARD = ModelCard(id="m", created=5, max_model_len=64, block_len=4, bundle_hash="0123456789abcdef", mode="single-pass")
TOOLS = ToolUse(functions=({"name": "add"},))
WORDS = [
    TextDelta("", None, UsageCounts(3)),
    TextDelta("Hel", None, UsageCounts(3, 1)),
    TextDelta("lo", "stop", UsageCounts(3, 2, (1, 0))),
]
CALLS = [
    TextDelta("", None, UsageCounts(3), tool_form="hermes"),
    TextDelta('I add.\n<tool_call>\n{"name": "add", "argu', None, UsageCounts(3, 1)),
    TextDelta('ments": {"a": 1}}', None, UsageCounts(3, 2)),
    TextDelta("\n</tool_call>", "stop", UsageCounts(3, 3)),
]


def reply(**changes):
    return ChatReply(**{"reply_id": "chatcmpl-1", "card": CARD, "created": 9} | changes)


def chunks(pieces, **changes):
    answer = reply(**changes)
    events = [event for piece in pieces for event in answer.events(0, piece)]
    read = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in read:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return read


def message(pieces, **changes):
    body = reply(**changes).body((0, piece) for piece in pieces)
    ChatCompletion.model_validate(json.loads(json.dumps(body)), strict=True)
    return body["choices"][0]


def test_a_message_is_openais():
    choice = message(WORDS)
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_the_role_comes_first_then_the_words_then_the_reason():
    read = chunks(WORDS)
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in read] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, "stop"),
    ]
    assert all("usage" not in chunk and "metrics" not in chunk for chunk in read)


def test_calls_are_streamed_name_first_and_join_to_the_whole():
    whole = message(CALLS, tools=TOOLS)
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "I add."
    (call,) = whole["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(CALLS, tools=TOOLS)]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    assert pieces[0] == {
        "index": 0, "id": pieces[0]["id"], "type": "function", "function": {"name": "add", "arguments": ""},
    }  # fmt: skip
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"a": 1}'
    assert [set(piece) for piece in pieces[1:]] == [{"index", "function"}]
    assert chunks(CALLS, tools=TOOLS)[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("tools", [None, ToolUse(functions=({"name": "other"},))])
def test_what_calls_no_offered_function_is_text(tools):
    choice = message(CALLS, tools=tools)
    assert choice["message"]["content"] == "".join(piece.text for piece in CALLS)
    assert choice["finish_reason"] == "stop"


def test_a_call_that_was_cut_ends_for_its_length():
    assert (
        message([*CALLS[:2], TextDelta("ments", "length", UsageCounts(3, 2))], tools=TOOLS)["finish_reason"] == "length"
    )


def test_calls_alone_have_no_content():
    assert (
        message([CALLS[0], TextDelta(CALLS[1].text[7:], None, UsageCounts(3)), *CALLS[2:]], tools=TOOLS)["message"][
            "content"
        ]
        is None
    )


def test_origins_of_tokens_are_sent_if_requested_also_of_a_call_that_is_still_parsed():
    decoding = [Decoding(forward=[i], origin=["draft"], text_offset=[7 * i]) for i in range(3)]
    calls = [CALLS[0], *(c._replace(decoding=d) for c, d in zip(CALLS[1:], decoding, strict=True))]
    sent = [chunk["choices"][0]["decoding"] for chunk in chunks(calls, tools=TOOLS)]
    joined = {"forward": [0, 1, 2], "origin": ["draft"] * 3, "text_offset": [0, 7, 14]}
    assert {name: [entry for d in sent if d for entry in d[name]] for name in joined} == joined
    assert message(calls, tools=TOOLS)["decoding"] == joined
    assert message(CALLS, tools=TOOLS)["decoding"] is None


def test_usage_and_scores_are_sent_if_requested():
    token = ChatTokenLogprob(token="a", logprob=-1.0, bytes=[97], top_logprobs=[])
    pieces = [WORDS[0], TextDelta("a", None, UsageCounts(3, 1), None, [token], token_ids=(5,)), WORDS[2]]
    assert message(pieces)["logprobs"]["content"][0]["bytes"] == [97]
    read = chunks(pieces, options=StreamOptions(include_usage=True, continuous_usage_stats=True))
    assert [chunk["usage"]["completion_tokens"] for chunk in read] == [0, 1, 2]
    assert [c["choices"][0]["token_ids"] for c in read] == [None, [5], None]
    answer = reply(options=StreamOptions(include_usage=True))
    assert all(json.loads(e.removeprefix("data: "))["usage"] is None for p in WORDS for e in answer.events(0, p))
    last = json.loads(answer.usage_event().removeprefix("data: "))
    ChatCompletionChunk.model_validate(last, strict=True)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 1
