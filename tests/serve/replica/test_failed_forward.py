"""A forward fails while texts run, wait, or have given up their pages: each goes on, or ends in one error."""

import asyncio
from dataclasses import replace

import pytest
import torch
from tiny import wide_model

from serve_apps.replica.decode_loop import DecodeLoop
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import TidarError
from tidar_core.transformer.shapes import named_shape

VOCAB = 320


class Alternating:
    """Even and odd tokens by turns."""

    def __init__(self):
        self.expected, self.finished = 0, False

    def allowed(self, tokens):
        rows = torch.arange(self.expected, self.expected + len(tokens) + 1)[:, None]
        return torch.arange(VOCAB)[None] % 2 == rows % 2

    def advance(self, tokens):
        self.expected += len(tokens)

    def retreat(self, count):
        self.expected -= count


@pytest.fixture(scope="module")
def model():
    return wide_model(replace(named_shape("tiny", vocab_len=300), context_len=8192))


async def tokens_of(loop, request):
    return tuple([t async for steps in loop.steps(request) for step in steps for t in step.token_ids])


@pytest.fixture
def crowded(model):
    """Four texts on pages for two and a half: the younger texts give their pages up when they have some text."""
    decoder = Decoder(
        model, DraftConfig(block_len=4), rows=4, context_len=80, page_len=4, pages=24, share_prefixes=False
    )
    return Scheduler(decoder, FixedMode("autoregressive", 4))


def failing_once(decoder, monkeypatch, name, when):
    """One forward fails, the first for which `when` holds; ids of the texts that had given up their pages then."""
    real, preempted = getattr(decoder, name), []

    def forward(*args, **kwargs):
        expected = [s.request.request_id for s in decoder._arriving if s.emitted and not s.holding.pages]
        if not preempted and when(expected):
            preempted.extend(expected)
            return 1 / 0
        return real(*args, **kwargs)

    monkeypatch.setattr(decoder, name, forward)
    return preempted


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("name", ["decode_step", "_read"])
def test_after_a_failed_forward_a_text_goes_on_where_it_was_or_fails(crowded, model, monkeypatch, name, constrained):
    sampling = SamplingConfig(max_tokens=60)
    requests = [
        Request(
            request_id=str(n), prompt=tuple(range(1 + n, 13 + n)), sampling=sampling,
            constraint=Alternating() if constrained else None,
        )
        for n in range(4)
    ]  # fmt: skip
    whole = [
        generate_autoregressive(model, r.prompt, sampling, Alternating() if constrained else None) for r in requests
    ]
    preempted = failing_once(
        crowded.decoder, monkeypatch, name, lambda expected: len(expected) >= 2 - (name == "_read")
    )
    loop = DecodeLoop(crowded)

    async def together():
        return await asyncio.gather(*[tokens_of(loop, r) for r in requests], return_exceptions=True)

    answers = asyncio.run(together())
    loop.stop()
    assert preempted, "some text had been sent in part and then gave up its pages"
    assert all(answers[int(name)] == whole[int(name)] for name in preempted)
    failed = [answer for answer in answers if not isinstance(answer, tuple)]
    assert failed
    assert {str(error) for error in failed} == {"the decoder failed on this request's batch: ZeroDivisionError"}
    assert [a for a in answers if isinstance(a, tuple)] == [w for w, a in zip(whole, answers) if isinstance(a, tuple)]
    assert crowded.decoder.pool.held == 0


def test_what_fails_before_any_forward_ends_the_request_that_it_concerns_and_not_the_queue(model, monkeypatch):
    batcher = Scheduler(Decoder(model, DraftConfig(block_len=4), rows=1))
    hold = batcher.decoder._hold
    monkeypatch.setattr(batcher.decoder, "_hold", lambda sequence: 1 / 0 if sequence.arrival == 0 else hold(sequence))
    loop, sampling = DecodeLoop(batcher), SamplingConfig(max_tokens=9)

    async def together():
        request_of = [Request(request_id=name, prompt=(5, 6, 7), sampling=sampling) for name in "ab"]
        return await asyncio.wait_for(
            asyncio.gather(*[tokens_of(loop, r) for r in request_of], return_exceptions=True), 60
        )

    first, second = asyncio.run(together())
    loop.stop()
    assert isinstance(first, TidarError)
    assert second == generate_autoregressive(model, (5, 6, 7), sampling)
