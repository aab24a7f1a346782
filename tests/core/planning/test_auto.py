"""The goals of `auto` on simulated machines: nearly the best fixed plan, and never much slower than autoregression."""

import random

import pytest
from simulated_machine import Clock, Drafts, FixedCycle, SimulatedDecoder, best_fixed, cpu_seconds, gpu_seconds, served

from tidar_core.config import DraftConfig
from tidar_core.planning.candidate_plans import few_candidates
from tidar_core.planning.planner import AutoPlanner
from tidar_core.planning.reviews import REVIEW_CREDIT, REVIEW_SHARE
from tidar_core.planning.step_timing import decoding_latency

DRAFTS = {
    "good": Drafts(easy=0.92, hard=0.92),
    "middling": Drafts(easy=0.6, hard=0.6),
    "in runs": Drafts(easy=0.93, hard=0.3),
    "poor": Drafts(easy=0.3, hard=0.3),
}
NOISE = Drafts(easy=0.005, hard=0.005)
MACHINES = {
    "gpu": (gpu_seconds, 16, few_candidates(16)),
    "cpu": (cpu_seconds, 8, few_candidates(8)),
}


@pytest.fixture(scope="module")
def machine():
    """A simulated decoder and a planner with the table of its start, by machine; the table is timed once."""
    tables = {}

    def of(name, loop=0.0):
        seconds, block_len, candidates = MACHINES[name]
        draft = DraftConfig(block_len=block_len)
        decoder = SimulatedDecoder(Clock(), seconds, slots=64, captures=name == "gpu", draft=draft)
        if name not in tables:
            tables[name] = decoding_latency(decoder, clock=decoder.clock)
        return decoder, AutoPlanner(tables[name], block_len, candidates, clock=decoder.clock)

    return of


def traffic(batch):
    """Fewer tokens for each sequence of a larger batch, which learns sooner. One sequence has 96 texts.

    With a third of them, chance moves the ratio of two plans by 1 to 2 %.
    """
    return {"batch": batch, "tokens": 9600 if batch == 1 else max(3200, 500 * batch)}


@pytest.mark.slow
@pytest.mark.parametrize("drafts", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("name", MACHINES)
def test_auto_is_nearly_as_fast_as_the_best_fixed_plan_by_brute_force(machine, name, batch, drafts):
    decoder, planner = machine(name)
    served(planner, decoder, drafts, **traffic(batch), seed=1)
    best, _ = best_fixed(planner.candidates, decoder, drafts, **traffic(batch))
    assert served(planner, decoder, drafts, **traffic(batch)) >= 0.97 * best


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("name", MACHINES)
def test_drafts_that_are_noise_cost_a_fiftieth_of_autoregression_at_most(machine, name, batch):
    """The speed counts from the first step on, with every probe and review."""
    decoder, planner = machine(name)
    began = decoder.clock()
    speed = served(planner, decoder, NOISE, batch=batch, tokens=2000 * batch, length=1000)
    assert decoder.clock() > began
    assert speed >= 0.98 * batch / decoder.seconds(1, batch, 500)


@pytest.mark.parametrize(("batch", "tokens", "seed"), [(1, 3200, 1), (8, 16_000, 6), (8, 16_000, 9)])
def test_plans_that_promise_nearly_as_much_are_tried_on_a_machine_that_no_formula_describes(batch, tokens, seed):
    """The time of each count of query tokens is off by a twelfth. The formula alone keeps to 0.89 to 0.92."""
    luck, factors = random.Random(seed), {}

    def uneven(rows, batch, context):
        return gpu_seconds(rows, batch, context) * factors.setdefault(rows, luck.gauss(1, 0.08))

    clock = Clock()
    decoder = SimulatedDecoder(clock, uneven, slots=64, captures=True, draft=DraftConfig(block_len=16))
    planner = AutoPlanner(decoding_latency(decoder, clock=clock), 16, few_candidates(16), clock=clock)
    served(planner, decoder, DRAFTS["middling"], batch=batch, tokens=tokens, seed=1)
    best, _ = best_fixed(planner.candidates, decoder, DRAFTS["middling"], batch=batch, tokens=tokens)
    assert served(planner, decoder, DRAFTS["middling"], batch=batch, tokens=tokens) >= 0.96 * best


def test_drafts_that_the_choice_never_verifies_are_tried_in_the_other_mode():
    """Texts repeat themselves from some place on. Short blocks never show how many drafts would be accepted there.

    Without steps of the other mode, the planner keeps to 0.95 of the best plan.
    """

    def small(rows, batch, context):
        return (0.35 + 0.03 * rows * batch) / 1000

    clock, texts = Clock(), Drafts(easy=0.985, hard=0.6, decay=1.0, late=1.2, passage=250, loops=True)
    decoder = SimulatedDecoder(clock, small, slots=1, draft=DraftConfig(block_len=8))
    planner = AutoPlanner(decoding_latency(decoder, clock=clock), 8, clock=clock)
    served(planner, decoder, texts, batch=1, tokens=3000, seed=1)
    best, _ = best_fixed(planner.candidates, decoder, texts, batch=1, tokens=20_000, seed=11)
    assert served(planner, decoder, texts, batch=1, tokens=20_000, seed=11) >= 0.97 * best


def test_a_machine_whose_memory_others_use_at_times_is_followed():
    """A step of one token gets slower then, and one of many tokens faster, as processors of some hosts do.

    Every 15 s that changes. A planner that believes a rare step as little as a frequent one keeps to 0.93.
    """

    def machine():
        clock, luck = Clock(), random.Random(0)

        def crowded(rows, batch, context):
            read, token = (9.2, 0.26) if int(clock.now / 15) % 2 else (6.2, 0.62)
            return (read + token * rows * batch) / 1000 * luck.lognormvariate(0, 0.04)

        return SimulatedDecoder(clock, crowded, slots=1, draft=DraftConfig(block_len=8))

    decoder, drafts = machine(), DRAFTS["in runs"]
    planner = AutoPlanner(decoding_latency(decoder, clock=decoder.clock), 8, clock=decoder.clock)
    served(planner, decoder, drafts, batch=1, tokens=3000, seed=1)
    speeds = {}
    for candidate in (planner, *(FixedCycle(few.cycle) for few in few_candidates(8))):
        of_candidate = decoder if candidate is planner else machine()
        of_candidate.clock.now = 600.0
        speeds[candidate] = served(candidate, of_candidate, drafts, batch=1, tokens=10_000)
    assert speeds.pop(planner) >= 0.97 * max(speeds.values())


@pytest.mark.parametrize("batch", [1, 64])
def test_reviews_take_no_more_than_their_share_however_slow_they_are(machine, batch, monkeypatch):
    decoder, planner = machine("gpu")
    clock, weigh, reviews = decoder.clock, planner.weigh, []

    def slow(requests, *of, **how):
        clock.run(0.01)
        reviews.append(len(requests))
        return weigh(requests, *of, **how)

    monkeypatch.setattr(planner, "weigh", slow)
    began = clock()
    served(planner, decoder, DRAFTS["in runs"], batch=batch, tokens=4000 if batch == 1 else 30_000)
    assert len(reviews) >= 3
    assert 0.01 * len(reviews) <= REVIEW_CREDIT + REVIEW_SHARE * (clock() - began) + 0.01


def test_the_loop_s_own_time_counts_as_part_of_every_step(machine):
    """Drafts that do not pay for a bare step pay when the loop takes as long as the step again."""
    drafts, chosen = Drafts(easy=0.4, hard=0.4), {}
    for loop in (0.0, 0.06):
        decoder, planner = machine("cpu")
        speed = served(planner, decoder, drafts, batch=4, tokens=4000, loop=loop)
        best, _ = best_fixed(planner.candidates, decoder, drafts, batch=4, tokens=4000, loop=loop)
        assert speed >= 0.96 * best
        assert planner.facts()["expected_tokens_per_second"] == pytest.approx(speed, rel=0.1)
        chosen[loop] = planner.choice.mode
    assert chosen[0.0] == "autoregressive" != chosen[0.06]


@pytest.mark.parametrize(("name", "drafts"), [("cpu", "good"), ("gpu", "middling")])
@pytest.mark.parametrize("length", [12, 24])
def test_what_short_texts_lose_at_their_beginning_and_end_is_forecast(machine, name, drafts, length):
    decoder, planner = machine(name)
    speed = served(planner, decoder, DRAFTS[drafts], batch=4, tokens=20_000, length=length)
    assert planner.choice.mode != "autoregressive"
    assert planner.facts()["expected_tokens_per_second"] == pytest.approx(speed, rel=0.05)


def test_exchanged_drafts_are_judged_by_themselves(machine):
    decoder, planner = machine("gpu")
    served(planner, decoder, NOISE, batch=8, tokens=8000)
    assert planner.choice.mode == "autoregressive"
    planner.forget_drafts()
    served(planner, decoder, DRAFTS["good"], batch=8, tokens=800)
    assert planner.choice.mode != "autoregressive"
    assert planner.facts()["chances"]["whole"][1] > 0.8


def test_a_batch_costs_as_much_as_the_slots_that_its_captured_steps_compute(machine):
    """A batch of 5 computes 8 slots, so plans are weighed at 8."""
    _, known = machine("gpu")
    rounding = AutoPlanner(known.latency.table, 16, known.candidates, computed_slots=lambda batch: 8)
    five, eight = [str(i) for i in range(5)], [str(i) for i in range(8)]
    for found, whole in zip(rounding.weigh(five, 500), known.weigh(eight, 500)):
        assert found.tokens_per_second == pytest.approx(whole.tokens_per_second * 5 / 8)
