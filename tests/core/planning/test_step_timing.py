"""The latency table of a start: it keeps its budget, and its formula meets the steps that no turn reached."""

import math

import pytest
from decoding import GREEDY, prompts, requests
from replay import StandInRecorder
from simulated_machine import Clock, SimulatedDecoder, cpu_seconds, gpu_seconds

from tidar_core.config import DraftConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.cuda_graphs import StepGraphs
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.planning.candidate_plans import few_candidates, timed_plans
from tidar_core.planning.planner import planner_of
from tidar_core.planning.step_timing import decoding_latency, latency_shapes
from tidar_core.timing import LONG_SECONDS, TIMED, median_seconds


def smollm2(rows, batch, context):
    """135 M weights in fp32 on two busy cores: the keys of 64 long prefixes alone are copied for 20 seconds."""
    return 0.035 + 0.009 * rows * batch + 4e-5 * batch * context


def decoder_of(clock, seconds, **sizes):
    return SimulatedDecoder(clock, seconds, **sizes)


@pytest.mark.parametrize("seconds", [smollm2, cpu_seconds, gpu_seconds])
@pytest.mark.parametrize("slots", [1, 8, 64])
@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("budget", [2.0, 20.0])
def test_timing_stays_within_its_budget(seconds, slots, captures, budget):
    clock = Clock()
    decoding_latency(decoder_of(clock, seconds, slots=slots, captures=captures), budget=budget, clock=clock)
    assert 0 < clock.now <= budget


def test_a_budget_that_is_too_small_times_one_step_alone():
    clock = Clock()
    table = decoding_latency(decoder_of(clock, smollm2), budget=0.01, clock=clock)
    assert [(p.rows, p.batch, p.context) for p in table.points] == [(1, 1, 128)]
    assert clock.runs == 2


@pytest.mark.parametrize("seconds", [smollm2, cpu_seconds, gpu_seconds])
@pytest.mark.parametrize("slots", [1, 8, 64])
def test_the_formula_of_a_start_meets_every_step_within_an_eighth(seconds, slots):
    clock = Clock()
    formula = decoding_latency(decoder_of(clock, seconds, slots=slots), clock=clock).formula
    for batch in {1, min(2, slots), max(1, slots // 2), slots}:
        for context in (64, 700, 3000, 8000):
            for rows in (1, 2, 8, 9, 16, 40, 72):
                assert formula.seconds(rows, batch, context) == pytest.approx(seconds(rows, batch, context), rel=0.12)


def test_with_time_enough_every_shape_is_timed_in_every_turn():
    clock = Clock()
    decoder = decoder_of(clock, lambda *_: 0.0005, slots=4, context_len=1024)
    table = decoding_latency(decoder, budget=math.inf, clock=clock, repeats=3)
    assert {(p.batch, p.context) for p in table.points} == set(latency_shapes(decoder))
    plans = timed_plans(few_candidates(8))
    assert {(p.rows, p.drafts) for p in table.points if (p.batch, p.context) == (1, 128)} == {
        (plan.query_tokens(8), bool(plan.groups)) for plan in plans
    }
    assert clock.runs == 3 * (len(plans) + 5 * (len(latency_shapes(decoder)) - 1)) * (2 + TIMED)


def test_a_slow_moment_at_the_start_does_not_count_where_steps_are_short():
    """Steps of a tenth of a millisecond take three times as long for a twentieth of a second."""
    clock = Clock()
    decoder = decoder_of(clock, lambda *_: 0.0001 * (3 if clock.now < 0.05 else 1), slots=1, context_len=128)
    formula = decoding_latency(decoder, clock=clock).formula
    assert 0.3 <= clock.now < 0.4
    assert formula.seconds(4, 1, 128) == pytest.approx(0.0001, rel=0.02)


def test_the_shapes_with_the_fewest_keys_come_first():
    shapes = latency_shapes(decoder_of(Clock(), smollm2))
    assert shapes[:4] == [(1, 128), (4, 128), (1, 1024), (8, 128)]
    assert sorted(shapes) == [(b, c) for b in (1, 4, 8) for c in (128, 1024, 8192)]


@pytest.mark.usefixtures("plain_kernels")
def test_a_decoder_that_captures_its_steps_captures_every_plan_before_traffic_comes(model):
    decoder = Decoder(model, DraftConfig(block_len=4), slots=1, context_len=64)
    decoder._graphs = StepGraphs(decoder._runner, StandInRecorder())
    planner = planner_of("auto", decoder, decoding_latency(decoder, repeats=1))
    captured = decoder._graphs.captured
    assert captured >= len(timed_plans(few_candidates(4)))
    complete(Scheduler(decoder, planner), requests(prompts(20, 30), GREEDY))
    assert decoder._graphs.captured == captured


def test_a_long_run_counts_after_one_that_does_not_a_short_one_in_a_row():
    clock, counts = Clock(), {"short": 0, "long": 0}

    def run(name, seconds):
        counts[name] += 1
        clock.run(seconds)

    found = median_seconds([lambda: run("short", 0.001), lambda: run("long", 2 * LONG_SECONDS)], 1, clock)
    assert counts == {"short": 2 + TIMED, "long": 2}
    assert found == pytest.approx([0.001, 2 * LONG_SECONDS])
