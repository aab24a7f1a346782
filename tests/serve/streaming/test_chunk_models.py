"""A chunk of a stream has the fields of its response model, in the same order, with the same values."""

import json

import pytest

from serve_apps.api.chat_response import ChatChunk
from serve_apps.api.completion_response import Completion, ModelCard
from serve_apps.api.generation_fields import StreamOptions
from serve_apps.messages.generation_request import ToolUse
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import ChatLogprob, ChatTokenLogprob, Logprobs, TokenScore
from serve_apps.streaming.chat_stream import ChatReply
from serve_apps.streaming.completion_stream import CompletionReply

CARD = ModelCard(id="m", created=5, max_model_len=64, block_len=4, bundle_hash="0123456789abcdef", mode="single-pass")
USAGE = StreamOptions(continuous_usage_stats=True)
LOGPROBS = Logprobs(text_offset=[0], token_logprobs=[-1e-07], tokens=["ü\n"], top_logprobs=[{"ü": -0.5}])
SCORES = [None, {7: TokenScore(logprob=-2.0, rank=None, decoded_token="x")}]
CHAT_LOGPROBS = [
    ChatTokenLogprob(token="a", logprob=-1.0, bytes=[97], top_logprobs=[ChatLogprob(token="b", logprob=-2.0, bytes=[])])
]
DECODING = Decoding(forward=[0], origin=["draft"], text_offset=[0])
TEXT = TextDelta("ü\n\x7f\u2028", None, UsageCounts(3, 1), prompt_token_ids=(1, 2), token_ids=(3,), fingerprint="f")
END = TextDelta("", "stop", UsageCounts(3, 2, (1, 0)), stop_reason=5)
CALL = TextDelta('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "stop", UsageCounts(3, 2),
                 tool_form="hermes")  # fmt: skip


def lines(reply, *deltas):
    return [line.removeprefix("data: ").removesuffix("\n\n") for d in deltas for line in reply.events(0, d)]


def dumped(model, line):
    """The same chunk as the model writes it; of a message's delta only the fields that are there."""
    chunk = model.model_validate_json(line).model_dump(mode="json")
    del chunk["metrics"]
    if model is ChatChunk:
        choice = chunk["choices"][0]
        choice["delta"] = model.model_validate_json(line).choices[0].delta.model_dump(mode="json", exclude_none=True)
    return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize(
    "delta",
    [TEXT, END, TEXT._replace(logprobs=LOGPROBS, prompt_logprobs=SCORES),
     TEXT._replace(decoding=DECODING)],
)  # fmt: skip
def test_a_chunk_of_a_completion_is_written_as_its_model_writes_it(delta):
    (line,) = lines(CompletionReply(reply_id="cmpl-1", card=CARD, created=9, options=USAGE), delta)
    assert line == dumped(Completion, line)


@pytest.mark.parametrize("delta", [TEXT, END, CALL, TEXT._replace(logprobs=CHAT_LOGPROBS),
                                   TEXT._replace(decoding=DECODING)])  # fmt: skip
def test_a_chunk_of_a_chat_is_written_as_its_model_writes_it(delta):
    tools = ToolUse(functions=({"name": "add"},))
    written = lines(ChatReply(reply_id="chatcmpl-1", card=CARD, created=9, options=USAGE, tools=tools), delta)
    assert len(written) > 1
    for line in written:
        assert line == dumped(ChatChunk, line)
