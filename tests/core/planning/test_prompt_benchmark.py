"""Times of long prompts: the chunks of a prompt, the steps behind it, and the gaps of a stream beside it."""

from dataclasses import replace

import pytest
from tiny import wide_model

from tidar_core.decoding.decoder import Decoder
from tidar_core.errors import RequestError
from tidar_core.planning.prompt_benchmark import BESIDE, ROOM, prompt_costs, random_prompt, require_room
from tidar_core.transformer.shapes import named_shape

SECONDS_A_TOKEN, SECONDS_A_FORWARD = 0.001, 0.05


@pytest.fixture(scope="module")
def model():
    return wide_model(replace(named_shape("tiny"), context_len=1200))


@pytest.fixture
def clock(monkeypatch):
    """A clock that forwards move: by a fixed time, and for each token that they read or decode."""
    now = [0.0]

    def moved(tokens):
        now[0] += SECONDS_A_FORWARD + SECONDS_A_TOKEN * tokens

    def timed_read(self, reading):
        moved(reading.tokens * reading.left / self.model.config.layers)
        read(self, reading)

    def timed_step(self, plan, beside, layers):
        moved(len(self.running) + (beside.tokens * layers / self.model.config.layers if beside else 0))
        return step(self, plan, beside, layers)

    read, step = Decoder.read, Decoder.decode_step
    monkeypatch.setattr(Decoder, "read", timed_read)
    monkeypatch.setattr(Decoder, "decode_step", timed_step)
    return lambda: now[0]


def test_times_are_those_of_the_forwards(model, clock):
    """1,100 tokens are three forwards of 512, 512 and 76 tokens, and a decode step has one."""
    seen = []
    costs = prompt_costs(model, [1100, 30, 30], repeats=2, on_prompt=seen.append, clock=clock)
    assert costs == seen
    assert [cost.prompt_tokens for cost in costs] == [30, 1100]
    short, long = costs
    assert [short.first_token_seconds, short.first_chunk_seconds] == pytest.approx([0.08, 0.08])
    assert long.first_token_seconds == pytest.approx(3 * 0.05 + 1.1)
    assert long.tokens_per_second == pytest.approx(1100 / 1.25)
    assert long.first_chunk_seconds == pytest.approx(0.05 + 0.512)
    assert long.last_chunk_seconds == pytest.approx(0.05 + 0.076)
    assert [short.step_seconds, long.step_seconds] == pytest.approx([0.051, 0.051])
    assert 1 < long.gap_steps <= long.longest_gap_steps < 2.5
    assert long.peak_bytes > 2**20


def test_a_stream_waits_beside_the_end_of_a_long_prompt(model, clock, monkeypatch):
    """There chunks see most keys, so the gaps are the longest."""
    beside, step = [], Decoder.decode_step

    def watched_step(self, plan, reading, layers):
        beside.extend(chunk.sequence.read for chunk in (reading.chunks if reading else []))
        return step(self, plan, reading, layers)

    monkeypatch.setattr(Decoder, "decode_step", watched_step)
    prompt_costs(model, [1150], repeats=1, clock=clock)
    assert min(beside) == 1150 - BESIDE
    assert max(beside) > 500


def test_a_prompt_that_the_context_cannot_hold_is_refused(model):
    require_room(model, [1200 - ROOM])
    with pytest.raises(RequestError, match=r"--prompt-len is 1184; with 17 tokens behind it, .*; give at most 1183"):
        require_room(model, [3, 1201 - ROOM])


def test_a_prompt_holds_every_token_but_the_mask_and_is_the_same_each_time(model):
    prompt = random_prompt(model, 9000)
    assert prompt == random_prompt(model, 9000)
    assert set(prompt) == set(range(model.config.vocab_size)) - {model.config.mask_id}
