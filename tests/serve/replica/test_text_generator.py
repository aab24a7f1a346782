"""Pieces of text from the steps of an engine."""

import asyncio
from itertools import pairwise

import chat_templates
import pytest

from serve_apps.messages.generation_request import GenerationRequest, ToolUse
from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.version_stats import VersionStats
from serve_apps.replica.engine import Heard
from serve_apps.replica.text_generator import TextGenerator
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.settings import ServeSettings
from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.streaming.tool_call_parser import ToolCallReader
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep

LAP = RequestTiming(0.1, 0.2, 0.3)
CALL = ("<tool_call>", '\n{"name": "now", "arguments": {}}\n', "</tool_call>")


@pytest.fixture
def tokenizer(monkeypatch):
    """One of which the marks of a call are special tokens."""
    special = [*chat_templates.SPECIAL["qwen2.5"], CALL[0], CALL[2]]
    monkeypatch.setitem(chat_templates.SPECIAL, "qwen2.5", special)
    return chat_templates.chat_tokenizer("qwen2.5")


class Engine:
    """Says the tokens that it was given, one a step, in these batches; the last one ends the text."""

    tool_form = "hermes"

    def __init__(self, *batches):
        self._batches = batches

    async def steps(self, _):
        prompt, left = (5, 6), sum(map(len, self._batches))
        for batch in self._batches:
            steps = []
            for token in batch:
                left -= 1
                steps.append(DecodeStep("r", (token,), None if left else "stop", 1, 1, 1))
            yield Heard(steps, LAP if steps else None, prompt)
            prompt = ()


def written(tokenizer, engine, **asked):
    settings = ServeSettings(model="m")
    served = ModelVersion(settings=settings, bundle_uri="m", bundle_hash="abc", block_len=4)
    writer = TextGenerator(served, engine, tokenizer, VersionStats())
    request = GenerationRequest(request_id="r", prompt="x", sampling=SamplingConfig(max_tokens=99), **asked)

    async def pieces():
        return [piece async for piece in writer.pieces(request)]

    return asyncio.run(pieces()), writer.totals


def spoken(tokenizer):
    """Tokens of a call, and the end of text."""
    opening, words, closing = CALL
    special = tokenizer.special_ids
    return [special[opening], *tokenizer.encode(words), special[closing], tokenizer.eos_id]


def test_a_call_between_special_tokens_is_found(tokenizer):
    use = ToolUse(functions=({"name": "now"},))
    pieces, _ = written(tokenizer, Engine(spoken(tokenizer)), tools=use)
    assert "".join(piece.text for piece in pieces) == "".join(CALL)
    reader = ToolCallReader(FORMS[pieces[0].tool_form], use.names)
    assert [call.name for piece in pieces for call in reader.push(piece.text).calls if call.name] == ["now"]


def test_without_tools_special_tokens_have_no_text(tokenizer):
    pieces, _ = written(tokenizer, Engine(spoken(tokenizer)))
    assert "".join(piece.text for piece in pieces) == CALL[1]


@pytest.mark.parametrize("cuts", [(), (0,), (0, 2), (2,), (1, 2)])
@pytest.mark.parametrize("pieces", [True, False])
def test_the_first_piece_tells_who_writes_and_the_last_how_long_it_took_also_where_they_are_one(
    tokenizer, cuts, pieces
):
    tokens = [*tokenizer.encode("abc"), tokenizer.eos_id]
    places = [0, *cuts, len(tokens)]
    told, totals = written(tokenizer, Engine(*(tokens[a:b] for a, b in pairwise(places))), pieces=pieces)
    assert "".join(piece.text for piece in told) == "abc"
    assert len(told) == (len(cuts) + 1 if pieces else min(len(cuts), 1) + 1)
    assert [bool(piece.fingerprint) for piece in told] == [True] + [False] * (len(told) - 1)
    assert [(piece.finish_reason, piece.lap) for piece in told] == [(None, None)] * (len(told) - 1) + [("stop", LAP)]
    assert told[-1].tally.prompt_tokens == 2
    assert (totals.texts, totals.firsts, totals.tokens, totals.forwards) == (1, 1, 4, 4)
