"""Pieces of text from the steps of an engine."""

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import chat_templates
import pytest

from serve_apps.messages.generation_request import GenerationRequest, ToolUse
from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.version_stats import VersionStats
from serve_apps.replica.delta_receiver import DeltaReceiver
from serve_apps.replica.text_generator import TextGenerator
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.settings import ServeSettings
from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.streaming.tool_call_parser import ToolCallParser
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep

TIMING = RequestTiming(0.1, 0.2, 0.3)
CALL = ("<tool_call>", '\n{"name": "now", "arguments": {}}\n', "</tool_call>")


@pytest.fixture
def tokenizer(monkeypatch):
    """One of which the marks of a call are special tokens."""
    special = [*chat_templates.SPECIAL["qwen2.5"], CALL[0], CALL[2]]
    monkeypatch.setitem(chat_templates.SPECIAL, "qwen2.5", special)
    return chat_templates.chat_tokenizer("qwen2.5")


class Engine:
    """Generates the tokens that it was given, one a step, delivered in these batches; the last one ends the text."""

    def __init__(self, tokenizer, *batches):
        self._tokenizer, self._batches = tokenizer, batches

    async def generate(self, request):
        deltas, left = [], sum(map(len, self._batches))
        receiver = DeltaReceiver(
            self._tokenizer, request, (5, 6), deltas.append, block_len=4, fingerprint="abc", tool_form="hermes",
            timing=SimpleNamespace(timing=TIMING),
        )  # fmt: skip
        for batch in self._batches:
            for token in batch:
                left -= 1
                receiver.take(DecodeStep("r", (token,), None if left else "stop", 1, 1, 1))
            receiver.deliver(last=not left)
        for delta in deltas:
            yield delta


def written(engine, **fields):
    settings = ServeSettings(model="m")
    served = ModelVersion(settings=settings, bundle_uri="m", bundle_hash="abc", block_len=4)
    writer = TextGenerator(served, engine, VersionStats())
    request = GenerationRequest(request_id="r", prompt="x", sampling=SamplingConfig(max_tokens=99), **fields)

    async def pieces():
        return [piece async for piece in writer.generate(request)]

    return asyncio.run(pieces()), writer.totals


def spoken(tokenizer):
    """Tokens of a call, and the end of text."""
    opening, words, closing = CALL
    special = tokenizer.special_ids
    return [special[opening], *tokenizer.encode(words), special[closing], tokenizer.eos_id]


def test_a_call_between_special_tokens_is_found(tokenizer):
    use = ToolUse(functions=({"name": "now"},))
    pieces, _ = written(Engine(tokenizer, spoken(tokenizer)), tools=use)
    assert "".join(piece.text for piece in pieces) == "".join(CALL)
    reader = ToolCallParser(FORMS[pieces[0].tool_form], use.names)
    assert [call.name for piece in pieces for call in reader.push(piece.text).calls if call.name] == ["now"]


def test_without_tools_special_tokens_have_no_text(tokenizer):
    pieces, _ = written(Engine(tokenizer, spoken(tokenizer)))
    assert "".join(piece.text for piece in pieces) == CALL[1]


@pytest.mark.parametrize("cuts", [(), (0,), (0, 2), (2,), (1, 2)])
@pytest.mark.parametrize("pieces", [True, False])
def test_the_first_delta_names_the_weights_and_the_last_has_the_durations_also_if_they_are_one(tokenizer, cuts, pieces):
    tokens = [*tokenizer.encode("abc"), tokenizer.eos_id]
    places = [0, *cuts, len(tokens)]
    deltas, totals = written(Engine(tokenizer, *(tokens[a:b] for a, b in pairwise(places))), pieces=pieces)
    assert "".join(piece.text for piece in deltas) == "abc"
    assert len(deltas) == (len(cuts) + 1 if pieces else min(len(cuts), 1) + 1)
    assert [bool(piece.fingerprint) for piece in deltas] == [True] + [False] * (len(deltas) - 1)
    assert [(piece.finish_reason, piece.timing) for piece in deltas] == [(None, None)] * (len(deltas) - 1) + [
        ("stop", TIMING)
    ]
    assert deltas[-1].usage.prompt_tokens == 2
    assert (totals.texts, totals.firsts, totals.tokens, totals.forwards) == (1, 1, 4, 4)
