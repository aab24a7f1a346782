"""From decode steps to what a client reads."""

import asyncio
import json
from itertools import pairwise

import pytest
from openai.types import Completion

from serve_apps.errors import problem_of
from serve_apps.events import DONE, Failed, Piece, Reply, Tally, Transcript, error_event, interleave
from serve_apps.schemas import ModelCard, StreamOptions
from tidar_core.artifacts.tokenizer import train_bpe
from tidar_core.errors import CapacityError
from tidar_core.request import DecodeStep

CARD = ModelCard(id="m", created=5, max_model_len=64, block_len=4, bundle_hash="0123456789abcdef", mode="single-pass")
TEXT = "Grüße, 日本語 🎉!"
SILENT, USAGE = StreamOptions(), StreamOptions(include_usage=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["plain words, then more plain words"], 270)


@pytest.fixture
def transcript(tokenizer):
    return Transcript(tokenizer.stream(), prompt_tokens=3, block_len=4)


@pytest.fixture
def reply():
    return Reply(completion_id="cmpl-1", card=CARD, created=9)


def steps_of(tokens, lengths, finish_reason):
    """A prefill, then decode steps of these lengths."""
    cuts = [0, 1, *(1 + sum(lengths[: i + 1]) for i in range(len(lengths)))]
    return [
        DecodeStep(
            "r",
            tuple(tokens[a:b]),
            finish_reason if b == cuts[-1] else None,
            *((1, 0, 0) if a == 0 else (b - a + 1, b - a, b - a + 1)),
        )
        for a, b in pairwise(cuts)
    ]


def data(event):
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))


def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer, transcript):
    tokens = tokenizer.encode(TEXT)
    pieces = []
    for step in steps_of(tokens, [3] * (len(tokens) // 3) + [len(tokens) - 1 - len(tokens) // 3 * 3], "length"):
        pieces.append(transcript.add([step]).take())
    assert "".join(piece.text for piece in pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_text_cut_within_a_character_ends_as_its_tokens_decode(tokenizer, transcript):
    tokens = tokenizer.encode("🎉")[:2]
    assert transcript.add(steps_of(tokens, [1], "length")).take().text == tokenizer.decode(tokens)


def test_the_token_that_stops_a_text_is_counted_but_not_spoken(tokenizer, transcript):
    stop = tokenizer.encode("s")[0]
    tokens = [*tokenizer.encode("words"), stop]
    piece = transcript.add(steps_of(tokens, [len(tokens) - 1], "stop")).take()
    assert (piece.text, piece.finish_reason) == ("words", "stop")
    assert piece.tally.completion_tokens == len(tokens)


def test_an_end_of_text_token_that_was_ignored_has_no_text(tokenizer, transcript):
    tokens = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert transcript.add(steps_of(tokens, [2], "length")).take().text == "ab"


def test_nothing_is_pending_until_a_character_is_whole(tokenizer, transcript):
    first, *rest = tokenizer.encode("é")
    assert not transcript.add([]).pending
    assert not transcript.add([DecodeStep("r", (first,), None, 0, 0)]).pending
    assert transcript.add([DecodeStep("r", tuple(rest), None, 1, 4)]).pending


def test_the_speculative_metrics_are_vllms(transcript):
    # decode steps that kept 4, 1, 1 and 2 drafts, the final first one included: 3, 0, 0 and 1 speculative tokens stood
    lengths = [4, 1, 1, 2]
    tally = transcript.add(steps_of([5] * 9, lengths, "length")).take().tally
    assert tally.metrics().speculative_decoding.model_dump() == {
        "mean_acceptance_length": 2.0,  # 8 tokens in 4 steps
        "draft_acceptance_rate": 4 / 12,
        "acceptance_histogram": [2, 1, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 12,
        "num_spec_tokens": 3,
    }
    assert tally.usage().model_dump() == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def test_tallies_of_several_prompts_add_up():
    assert Tally(1, 2, (3, 4)) + Tally(10, 20, (30, 40)) == Tally(11, 22, (33, 44))


def test_without_drafts_there_is_nothing_to_say_about_them():
    assert Tally(1, 5, (4,)).metrics() is None
    no_decode_step = Tally(1, 1, (0, 0)).metrics().speculative_decoding
    assert (no_decode_step.mean_acceptance_length, no_decode_step.draft_acceptance_rate) == (1.0, 0.0)


def test_a_body_is_a_completion_of_openai_with_a_choice_for_each_prompt(reply):
    pieces = [
        (1, Piece("", None, Tally(2))), (0, Piece("he", None, Tally(3))), (1, Piece("b", "stop", Tally(2, 2, (1, 0)))),
        (0, Piece("y", "length", Tally(3, 5, (0, 2)))),
    ]  # fmt: skip
    body = json.loads(reply.body(pieces).model_dump_json())
    read = Completion.model_validate(body, strict=True)
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in read.choices] == [
        (0, "hey", "length", None),
        (1, "b", "stop", None),
    ]
    assert (read.id, read.object, read.created, read.model) == ("cmpl-1", "text_completion", 9, "m")
    assert read.system_fingerprint == "0123456789ab-single-pass-4"
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (5, 7, 12)
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 3


def test_a_chunk_has_the_piece_and_no_usage_unless_asked(reply):
    chunk = data(reply.chunk(0, Piece("he", None, Tally(3, 1)), SILENT))
    assert chunk["choices"] == [{"index": 0, "text": "he", "logprobs": None, "finish_reason": None}]
    assert "usage" not in chunk
    assert "metrics" not in chunk
    assert data(reply.chunk(0, Piece("", "stop", Tally(3, 2)), SILENT))["choices"][0]["finish_reason"] == "stop"


def test_a_piece_without_news_is_no_chunk(reply):
    assert reply.chunk(0, Piece("", None, Tally(3)), SILENT) == ""


def test_with_include_usage_the_last_chunk_alone_has_it(reply):
    assert data(reply.chunk(0, Piece("he", None, Tally(3, 1, (0, 0))), USAGE))["usage"] is None
    reply.chunk(1, Piece("x", "stop", Tally(1, 4, (1, 1))), USAGE)
    reply.chunk(0, Piece("y", "length", Tally(3, 2, (1, 0))), USAGE)
    last = data(reply.usage_chunk())
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert last["metrics"]["speculative_decoding"]["acceptance_histogram"] == [2, 1]
    Completion.model_validate(last, strict=False)


def test_continuous_usage_counts_the_tokens_so_far(reply):
    options = StreamOptions(continuous_usage_stats=True)
    assert data(reply.chunk(0, Piece("he", None, Tally(3, 4)), options))["usage"]["completion_tokens"] == 4


def test_an_error_in_a_stream_is_openais_envelope():
    assert data(error_event(problem_of(CapacityError("full"))))["error"]["code"] == "rate_limit_exceeded"
    assert DONE == "data: [DONE]\n\n"


class Source:
    """Gives events one by one and says whether it was closed."""

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
    a, b = Piece("a", None, Tally()), Piece("b", "stop", Tally())
    items = asyncio.run(gather(Source(a, a, b), Source(b), Source(a, b)))
    assert sorted(items, key=lambda item: item[0]) == [(0, a), (0, a), (0, b), (1, b), (2, a), (2, b)]


@pytest.mark.parametrize("last", [Failed(CapacityError("full")), Piece("b", None, Tally())])
def test_the_first_failure_closes_the_other_sources(last):
    endless = Source(Piece("a", None, Tally()), forever=True)
    with pytest.raises((CapacityError, AssertionError)):
        asyncio.run(gather(endless, Source(last)))


def test_who_stops_listening_closes_the_sources():
    endless = Source(Piece("a", None, Tally()), forever=True)

    async def listen():
        pieces = interleave([endless.run()])
        await anext(pieces)
        await pieces.aclose()
        assert endless.closed

    asyncio.run(listen())
