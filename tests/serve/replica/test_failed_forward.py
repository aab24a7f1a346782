"""A forward fails while requests run, wait, or have given up their pages: each goes on, or ends in one error."""

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
        self.emitted, self.finished = 0, False

    def allowed(self, tokens):
        rows = torch.arange(self.emitted, self.emitted + len(tokens) + 1)[:, None]
        return torch.arange(VOCAB)[None] % 2 == rows % 2

    def advance(self, tokens):
        self.emitted += len(tokens)

    def retreat(self, count):
        self.emitted -= count


@pytest.fixture(scope="module")
def model():
    return wide_model(replace(named_shape("tiny", vocab_len=300), context_len=8192))


async def tokens_of(loop, request):
    return tuple([t async for steps in loop.steps(request) for step in steps for t in step.token_ids])


@pytest.fixture
def crowded(model):
    """Four texts on pages for two and a half: the younger ones give theirs up after some tokens."""
    decoder = Decoder(model, DraftConfig(block_len=4), slots=4, context_len=80, page_len=4, pages=24)
    return Scheduler(decoder, FixedMode("autoregressive", 4), share_prefixes=False)


def failing_once(scheduler, monkeypatch, *, reads):
    """One forward fails: the first that reads prompts while a text lacks its pages, or none while two lack theirs.

    Returns the ids of these texts.
    """
    decoder, preempted = scheduler.decoder, []
    step, read = decoder.decode_step, decoder.read

    def fail_if_due(reading):
        emitted = [s.request.request_id for s in scheduler._line if s.emitted and not s.pages.ids]
        if not preempted and len(emitted) >= 2 - reads and bool(reading) == reads:
            preempted.extend(emitted)
            raise ZeroDivisionError

    monkeypatch.setattr(decoder, "decode_step", lambda plan, *beside: fail_if_due(beside[0]) or step(plan, *beside))
    monkeypatch.setattr(decoder, "read", lambda reading: fail_if_due(reading) or read(reading))
    return preempted


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("reads", [False, True], ids=["step", "step that reads a prompt"])
def test_after_a_failed_forward_a_text_goes_on_where_it_was_or_fails(crowded, model, monkeypatch, reads, constrained):
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
    preempted = failing_once(crowded, monkeypatch, reads=reads)
    loop = DecodeLoop(crowded)

    async def together():
        return await asyncio.gather(*[tokens_of(loop, r) for r in requests], return_exceptions=True)

    answers = asyncio.run(together())
    loop.stop()
    assert preempted, "some request had sent a part of its text and then gave up its pages"
    assert all(answers[int(name)] == whole[int(name)] for name in preempted)
    failed = [answer for answer in answers if not isinstance(answer, tuple)]
    assert failed
    assert {str(error) for error in failed} == {"the decoder failed on this request's batch: ZeroDivisionError"}
    assert [a for a in answers if isinstance(a, tuple)] == [w for w, a in zip(whole, answers) if isinstance(a, tuple)]
    assert crowded.pool.held == 0


def test_what_fails_before_any_forward_ends_the_request_that_it_concerns_and_not_the_queue(model, monkeypatch):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1))
    hold = scheduler._hold
    monkeypatch.setattr(scheduler, "_hold", lambda sequence: 1 / 0 if sequence.arrival == 0 else hold(sequence))
    loop, sampling = DecodeLoop(scheduler), SamplingConfig(max_tokens=9)

    async def together():
        both = [Request(request_id=name, prompt=(5, 6, 7), sampling=sampling) for name in "ab"]
        return await asyncio.wait_for(asyncio.gather(*[tokens_of(loop, r) for r in both], return_exceptions=True), 60)

    first, second = asyncio.run(together())
    loop.stop()
    assert isinstance(first, TidarError)
    assert second == generate_autoregressive(model, (5, 6, 7), sampling)
