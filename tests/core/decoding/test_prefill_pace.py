"""Chunks of a long prompt beside running requests: no gap of theirs is longer than two decode steps."""

from dataclasses import replace
from itertools import pairwise

import pytest
from decoding import GREEDY, expected_texts, prompts, requests
from simulated_machine import Clock
from tiny import wide_model

from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.prefill_pace import (
    CHUNK_STEPS,
    FIRST_TOKENS,
    LEAST_ALONE,
    LEAST_BEHIND,
    LEAST_BESIDE,
    PrefillPace,
)
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.transformer.shapes import named_shape


def paced(pace, clock, *, step, token, steps=100, share=1.0, intercept=0.0, slower=1.0):
    """Gaps of requests that run beside chunks of an endless prompt, after ten steps without it.

    slower   factor of all steps after these ten
    """
    gaps, read = [], 0
    for index in range(10 + steps):
        began = clock()
        if index >= 10:
            read = pace.tokens(1)
            clock.run(intercept * (read > 0) + read * token)
        clock.run(step if index < 10 else step * slower)
        pace.step_ended(read, share)
        if read:
            gaps.append(clock() - began)
    return gaps


@pytest.mark.parametrize("token", [0.001, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("intercept", [0.0, 0.3])
def test_after_the_first_chunks_a_gap_is_two_steps_at_most(token, intercept):
    clock = Clock()
    pace = PrefillPace(512, clock)
    gaps = paced(pace, clock, step=1.0, token=token, intercept=intercept)
    assert max(gaps) <= 1.02 + intercept + max(1.0, FIRST_TOKENS * token)
    assert max(gaps[5:]) < 2.0
    assert min(gaps[5:]) >= 1.7 or pace.tokens(1) == 512


def test_chunks_have_a_least_and_a_most_length():
    for token, least, length in ((1.0, LEAST_ALONE, 16), (1.0, LEAST_BESIDE, 1), (1e-6, LEAST_ALONE, 512)):
        clock = Clock()
        pace = PrefillPace(512, clock, least=least)
        paced(pace, clock, step=1.0, token=token)
        assert pace.tokens(1) == length
    assert PrefillPace(8, clock).tokens(1) == 8
    assert pace.tokens(0) == 512


def test_where_the_shortest_chunk_takes_too_long_because_of_all_keys_before_it_chunks_have_four_tokens():
    """A bound that cannot be kept must not starve the prompt. With the next prompt, chunks are short again."""
    clock = Clock()
    pace = PrefillPace(512, clock, least=LEAST_BESIDE)
    gaps = paced(pace, clock, step=1.0, token=0.1, intercept=1.5)
    assert pace.tokens(1) == LEAST_BEHIND
    assert gaps[-50:] == pytest.approx([2.9] * 50)
    assert paced(pace, clock, step=1.0, token=0.1)[-1] < 2.0
    assert paced(pace, clock, step=1.0, token=0.5, intercept=0.3)[-1] == pytest.approx(1.8)


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_machine_that_becomes_slower_or_faster_is_noticed_while_a_prompt_is_read(slower):
    """Otherwise the longer step would count as the time of the chunk, and chunks would stay as short as can be."""
    clock = Clock()
    pace = PrefillPace(512, clock, least=LEAST_BESIDE)
    gaps = paced(pace, clock, step=1.0, token=0.01, slower=slower)
    assert gaps[-1] == pytest.approx(slower * (1 + CHUNK_STEPS), rel=0.05)


def test_if_more_requests_arrive_than_run_chunks_may_take_longer():
    clock = Clock()
    gaps = paced(PrefillPace(512, clock), clock, step=1.0, token=0.01, share=3.0)
    assert gaps[-1] == pytest.approx(1 + 3 * CHUNK_STEPS, rel=0.05)


def test_a_pause_without_running_requests_is_no_gap():
    clock = Clock()
    pace = PrefillPace(512, clock)
    paced(pace, clock, step=1.0, token=0.01)
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
        chunks.extend(chunk.plan.clean_len for chunk in some)
        return read(some)

    def slow_step(plan, beside):
        chunks.extend(chunk.plan.clean_len for chunk in beside)
        clock.run(1.0 + 0.03 * sum(chunk.plan.clean_len for chunk in beside))
        ends.append(clock())
        return step(plan, beside)

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
