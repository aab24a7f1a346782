"""Reviews have a share of the time, come when something is known, and find what holds at once."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from simulated_machine import Clock, Drafts, SimulatedDecoder, cpu_seconds, served

from tidar_core.config import DraftConfig
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning import planner as planner_module
from tidar_core.planning.candidate_plans import few_candidates
from tidar_core.planning.learning_steps import LearningSteps
from tidar_core.planning.planner import AutoPlanner
from tidar_core.planning.reviews import FIRST_REVIEW, LOOK_AGAIN, Choice, Review, Reviews
from tidar_core.planning.step_timing import decoding_latency

FOUND = Review(Choice("autoregressive", (StepPlan(1),), 1.0), 1.0, 0, ())
OTHER = replace(FOUND, choice=Choice("two-pass", (StepPlan(1, (1,), 4), StepPlan(4)), 1.0))


def decoded(reviews, clock, steps, *, step, review, batch=1, known=False, texts=0, found=FOUND):
    """Decode so many steps of `step` seconds, where a review takes `review` seconds; step and kind of each review."""
    requests, came, look = dict.fromkeys(map(str, range(batch))), [], []

    def renew(last, alike):
        clock.run(review)
        came.append((number, alike))
        return found

    for number in range(steps):
        if reviews.holding(requests.keys()) is None:
            look.append(number)
            reviews.look(requests.keys(), renew, known=known)
        clock.run(step)
        reviews.add_step(step, batch)
    reviews.add_texts(texts)
    return came, look


def test_the_gap_doubles_as_long_as_the_choice_stays_the_same():
    clock = Clock()
    came, look = decoded(Reviews(clock), clock, 1200, step=1.0, review=0.0)
    assert [step for step, _ in came] == [0, 4, 12, 28, *range(60, 1200, 64)]
    assert len(look) <= len(came) + 1100 // FIRST_REVIEW  # nothing is looked for while a review holds


def test_first_reviews_of_short_steps_wait_until_drafts_were_verified():
    """Reviews that take as long as five steps each would otherwise have spent their time in the first hundred steps."""
    clock = Clock()
    came, _ = decoded(Reviews(clock), clock, 2000, step=0.0004, review=0.002)
    steps = [step for step, _ in came]
    assert steps[0] == 0
    assert steps[2] >= 60
    assert 8 <= len(steps) <= 12
    assert max(later - step for step, later in pairwise(steps)) <= 600


def test_without_time_for_a_review_the_last_one_is_looked_for_seldom():
    clock = Clock()
    reviews = Reviews(clock)
    decoded(reviews, clock, 1, step=0.0004, review=0.002)
    _, look = decoded(reviews, clock, 320, step=0.0, review=0.002)
    assert len(look) <= 320 / LOOK_AGAIN + 1


@pytest.mark.parametrize(("seconds", "individual"), [(0.05, False), (2.0, True)])
def test_a_text_has_a_review_of_its_own_if_that_is_a_small_share_of_its_time(seconds, individual):
    """Texts of 100 steps, reviews of 2 ms."""
    clock = Clock()
    reviews = Reviews(clock)
    assert reviews.individual
    decoded(reviews, clock, 1000, step=seconds / 100, review=0.002, texts=10)
    assert reviews.individual == individual


def test_a_lone_request_that_is_known_and_all_lone_requests_have_a_review_each():
    clock = Clock()
    came, _ = decoded(Reviews(clock), clock, 40, step=1.0, review=0.0, known=True)
    assert {alike for _, alike in came} == {True, False}


@pytest.mark.parametrize(("step", "review"), [(0.05, 0.012), (0.0005, 0.008)])
def test_a_batch_of_a_new_size_is_reviewed_at_once(step, review):
    clock = Clock()
    reviews = Reviews(clock)
    decoded(reviews, clock, 2, step=step, review=review, batch=1)
    came, _ = decoded(reviews, clock, 2, step=step, review=review, batch=16)
    assert came == [(0, True)]


def test_a_review_that_lacks_a_little_time_comes_when_that_has_passed():
    """Each step of 5 ms allows for 0.165 ms of reviews; one takes 10 ms."""
    clock = Clock()
    came, look = decoded(Reviews(clock), clock, 70, step=0.005, review=0.01)
    assert [step for step, _ in came] == [0, pytest.approx(61, abs=1)]
    assert len(look) <= 8


def test_another_batch_has_its_own_review_and_until_then_the_nearest():
    clock = Clock()
    reviews = Reviews(clock)
    decoded(reviews, clock, 1, step=1e-6, review=10.0, batch=2)
    came, _ = decoded(reviews, clock, 1, step=1e-6, review=10.0, batch=3, found=OTHER)
    assert came == []
    assert reviews.holding({"0": 1, "1": 1, "2": 1}.keys())[0] is FOUND


@pytest.mark.parametrize("seconds", [1.0, 0.001])
def test_steps_that_are_learnt_from_together_teach_the_same(monkeypatch, seconds):
    """Short steps and long ones, learned from one by one and together: the same plans, times and rates."""
    learned = []
    for together in (1, planner_module.LEARNED_TOGETHER):
        monkeypatch.setattr(planner_module, "LEARNED_TOGETHER", together)
        decoder = SimulatedDecoder(
            Clock(), lambda *shape: seconds * cpu_seconds(*shape), draft=DraftConfig(block_len=8)
        )
        table = decoding_latency(decoder, clock=decoder.clock)
        planner = AutoPlanner(table, 8, few_candidates(8), clock=decoder.clock)
        speed = served(planner, decoder, Drafts(easy=0.8, hard=0.5), batch=4, tokens=4000)
        learned.append((speed, planner.facts(), planner.latency.slowdown))
    assert learned[0] == learned[1]


def counted(function, count):
    """The function, whose calls are counted."""

    def call(*given):
        count["calls"] += 1
        return function(*given)

    return call


@pytest.mark.parametrize("drafts", [Drafts(easy=0.9, hard=0.6), Drafts(easy=0.2, hard=0.1)], ids=["good", "bad"])
@pytest.mark.parametrize("batch", [1, 4])
def test_calm_runs_save_looking_for_plans_and_no_speed_is_lost(monkeypatch, drafts, batch):
    """Without them every plan is looked for. Plans whose time is forgotten in a calm run are timed after it."""
    learned, looked = [], []
    for calm in (LearningSteps.calm, lambda *of, **how: 0):
        monkeypatch.setattr(LearningSteps, "calm", calm)
        decoder = SimulatedDecoder(Clock(), cpu_seconds, draft=DraftConfig(block_len=8))
        planner = AutoPlanner(decoding_latency(decoder, clock=decoder.clock), 8, clock=decoder.clock)
        count = Counter()
        monkeypatch.setattr(planner, "_weighed_plan", counted(planner._weighed_plan, count))
        speed = served(planner, decoder, drafts, batch=batch, tokens=6000)
        learned.append((speed, planner.facts()["plans"]))
        looked.append(count["calls"])
    assert learned[0][0] == pytest.approx(learned[1][0], rel=0.005)
    assert learned[0][1] == learned[1][1]
    assert looked[0] < looked[1] / 4
