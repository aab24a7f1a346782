"""Chunks of a long prompt beside running requests: no gap of theirs is longer than two decode steps."""

from dataclasses import replace
from itertools import pairwise

import pytest
from decoding import GREEDY, expected_texts, prompts, requests
from simulated_machine import Clock
from tiny import wide_model

from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.prefill_pace import CHUNK_STEPS, FIRST_TOKENS, LEAST_TOKENS, RENEWED_EVERY, PrefillPace
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.transformer.shapes import named_shape

LAYERS = 30


class Prompt:
    """An endless prompt on its way through the layers of a simulated machine.

    A token takes `token` seconds for all layers. `keys` are the seconds that any chunk takes more for all layers, as
    all keys before it are read.
    """

    def __init__(self, pace, clock, *, token, keys=0.0, depth=LAYERS):
        self.pace, self.clock, self.token, self.keys, self.depth = pace, clock, token, keys, depth
        self.chunk = self.left = 0
        self.lengths, self.read = [], 0

    def advance(self):
        """Take the chunk in hand through the layers of the next gap."""
        if not self.left:
            self.chunk, self.left = self.pace.tokens(1), self.depth
        layers = self.pace.layers(self.chunk, self.left) if self.chunk else 0
        self.read = self.chunk * layers
        if layers:
            self.clock.run((self.chunk * self.token + self.keys) * layers / self.depth)
            self.lengths.append(self.chunk)
        self.left = self.left - layers if self.chunk else 0


def paced(pace, clock, *, step, token, steps=100, share=1.0, keys=0.0, slower=1.0, depth=LAYERS):
    """Gaps of requests that run beside chunks of an endless prompt, after ten steps without it; and the prompt.

    slower   factor of all steps after these ten
    """
    gaps, prompt = [], Prompt(pace, clock, token=token, keys=keys, depth=depth)
    for index in range(10 + steps):
        began = clock()
        if index >= 10:
            prompt.advance()
        clock.run(step if index < 10 else step * slower)
        pace.step_ended(prompt.read, share)
        if prompt.read:
            gaps.append(clock() - began)
    return gaps, prompt


@pytest.mark.parametrize("depth", [1, LAYERS])
@pytest.mark.parametrize("token", [0.001, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("keys", [0.0, 0.3])
def test_after_the_first_chunks_a_gap_is_two_steps_at_most(token, keys, depth):
    clock = Clock()
    pace = PrefillPace(512, clock, depth=depth)
    gaps, _ = paced(pace, clock, step=1.0, token=token, keys=keys, depth=depth)
    assert max(gaps) <= 1.02 + keys + max(1.0, FIRST_TOKENS * token)
    assert max(gaps[5:]) < 2.0
    assert min(gaps[5:]) >= 1.7 or pace.tokens(1) == 512


@pytest.mark.parametrize("token", [0.06, 0.2, 1.0])
@pytest.mark.parametrize("keys", [0.0, 5.0])
def test_a_chunk_that_is_too_long_for_one_gap_passes_some_layers_in_each_of_several(token, keys):
    clock = Clock()
    pace = PrefillPace(512, clock, depth=LAYERS)
    gaps, prompt = paced(pace, clock, step=1.0, token=token, keys=keys, steps=400)
    assert min(prompt.lengths) >= LEAST_TOKENS
    assert max(gaps[10:]) < 2.0
    assert sum(gaps[10:]) / len(gaps[10:]) > 1.6, "chunks are shorter than they may be"


def test_a_chunk_that_has_begun_ends_whatever_a_gap_may_read_later():
    clock = Clock()
    pace = PrefillPace(512, clock, depth=LAYERS)
    for tokens in (1, 16, 512):
        for left in (1, 7, LAYERS):
            assert 1 <= pace.layers(tokens, left) <= left


def test_chunks_have_a_least_and_a_most_length():
    """Even where 16 tokens take much too long in one layer, a prompt goes on."""
    for token, depth, length in ((1.0, 1, 16), (100.0, LAYERS, 16), (1e-6, 1, 512), (1e-6, LAYERS, 512)):
        clock = Clock()
        pace = PrefillPace(512, clock, depth=depth)
        paced(pace, clock, step=1.0, token=token, depth=depth)
        assert pace.tokens(1) == length
        assert token < 1.0 or pace.layers(length, depth) == 1
    assert PrefillPace(8, clock).tokens(1) == 8
    assert pace.tokens(0) == 512


def test_a_gap_now_and_then_has_no_chunk():
    clock = Clock()
    pace = PrefillPace(512, clock, depth=LAYERS)
    gaps, _ = paced(pace, clock, step=1.0, token=0.2, steps=10 * (RENEWED_EVERY + 1))
    assert len(gaps) == 10 * RENEWED_EVERY


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_machine_that_becomes_slower_or_faster_is_noticed_while_a_prompt_is_read(slower):
    """Otherwise the longer step would count as the time of the chunk, and chunks would stay as short as can be."""
    clock = Clock()
    pace = PrefillPace(512, clock, depth=LAYERS)
    gaps, _ = paced(pace, clock, step=1.0, token=0.01, slower=slower)
    assert gaps[-1] == pytest.approx(slower * (1 + CHUNK_STEPS), rel=0.05)


def test_if_more_requests_arrive_than_run_chunks_may_take_longer():
    clock = Clock()
    gaps, _ = paced(PrefillPace(512, clock), clock, step=1.0, token=0.01, share=3.0, depth=1)
    assert gaps[-1] == pytest.approx(1 + 3 * CHUNK_STEPS, rel=0.05)


def test_a_pause_without_running_requests_is_no_gap():
    clock = Clock()
    pace = PrefillPace(512, clock)
    paced(pace, clock, step=1.0, token=0.01, depth=1)
    length = pace.tokens(1)
    pace.idle()
    clock.run(1000.0)
    pace.step_ended(length, 1.0)
    assert pace.tokens(1) == length


def test_a_scheduler_reads_a_long_prompt_in_chunks_that_running_requests_hardly_notice(monkeypatch):
    """A decode step takes 1 s and a prompt token in its forward 0.03 s, so a chunk has 33 tokens at most."""
    model = wide_model(replace(named_shape("tiny"), context_len=512))
    decoder, clock = Decoder(model, DraftConfig(block_len=4), slots=2), Clock()
    read, step, chunks, ends = decoder.read, decoder.decode_step, [], []

    def slow_read(some):
        chunks.append(some.tokens * some.left / model.config.layers)
        return read(some)

    def slow_step(plan, beside, layers):
        chunks.append(beside.tokens * layers / model.config.layers if beside else 0)
        clock.run(1.0 + 0.03 * chunks[-1])
        ends.append(clock())
        return step(plan, beside, layers)

    monkeypatch.setattr(decoder, "read", slow_read)
    monkeypatch.setattr(decoder, "decode_step", slow_step)
    scheduler = Scheduler(decoder, FixedMode("autoregressive", 4), clock=clock)
    texts = prompts(5, 400)
    short, long = requests(texts, replace(GREEDY, max_tokens=60))
    emitted = {"0": (), "1": ()}
    scheduler.submit(short)
    while scheduler.busy:
        if len(emitted["0"]) == 8:
            scheduler.submit(long)
        for done in scheduler.advance():
            emitted[done.request_id] += done.token_ids
    assert list(emitted.values()) == expected_texts(model, texts, replace(GREEDY, max_tokens=60))
    assert chunks[0] == 5
    assert sum(chunks) == 405
    gaps = [after - before for before, after in pairwise(ends)]
    assert max(gaps) <= 1.0 + 0.03 * FIRST_TOKENS
    assert sorted(gaps)[-2] <= 2.05
