"""Steps to learn from: when one is run, and which."""

import math
from itertools import pairwise

import pytest

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.candidate_plans import Candidate
from tidar_core.planning.learning_steps import COMPARED_EVERY, TIMED_EVERY, LearningSteps, compared_every, probe_len
from tidar_core.planning.reviews import Choice, Review

K = 8
AR = Candidate("autoregressive", (StepPlan(1),))
DRAFT, VERIFY = StepPlan(1, (1,), 4), StepPlan(4)
TWO_PASS = Candidate("two-pass", (DRAFT, VERIFY))
SINGLE_PASS = Candidate("single-pass", (StepPlan(4, (1,), 4),))


def review_of(candidate, probe_every=0, other=None, compared_every=COMPARED_EVERY):
    """The review whose choice is the candidate; the other mode is run every 300 steps."""
    choice = Choice(candidate.mode, candidate.cycle, 1.0)
    return Review(choice, 1.0, probe_every, (), other, 300, compared_every)


def plans(choice, steps, untimed=(), **review):
    """Plans of so many steps; drafts are pending after each plan that drafts."""
    learning, found, pending = LearningSteps(K), [], 1
    for _ in range(steps):
        found.append(learning.next_plan(review_of(choice, **review), pending, untimed))
        pending = 4 if found[-1].groups else 1
    return found


@pytest.mark.parametrize(
    ("every", "found"), [(256, [32, 64, 128, 256, 512, 768, 1024]), (50, [32, 64, 114, 164, 214, 264, 314])]
)
def test_where_all_times_are_known_a_choice_that_drafts_is_compared_with_autoregression_alone(every, found):
    """Drafts that are pending are verified first: an autoregressive step would lose them."""
    for choice in (TWO_PASS, SINGLE_PASS):
        ran = plans(choice, 1100, compared_every=every)
        own = {*choice.cycle, choice.next_plan(1), StepPlan(choice.cycle[-1].clean_len)}
        assert {plan for plan in ran if plan not in own} == {StepPlan(1)}
        compared = [n for n, plan in enumerate(ran, 1) if plan == StepPlan(1)]
        late = list(range(len(found)))  # each one waits for a step that verifies
        assert all(n <= at <= n + place + 1 for n, at, place in zip(found, compared, late))
        assert all(not ran[at - 2].groups and ran[at - 2].clean_len > 1 for at in compared)


def test_an_autoregressive_step_does_not_wait_for_sequences_that_come_with_drafts_at_every_step():
    learning, review = LearningSteps(K), review_of(SINGLE_PASS, compared_every=50)
    found = [learning.next_plan(review, 4, ()) for _ in range(400)]
    assert found.count(StepPlan(1)) == found.count(VERIFY) == 8
    assert all(after == StepPlan(1) for before, after in pairwise(found) if before == VERIFY)


def test_the_less_drafting_promises_the_more_often_it_is_compared_with_autoregression():
    """Such a step loses the part of its time that drafting gains; 0.2 % of the time may be lost."""
    for promise, every in ((1.01, 50), (1.26, 103), (1.6, 187), (4.0, COMPARED_EVERY)):
        assert compared_every(math.log(promise), 0.0) == every
    assert compared_every(math.log(1.26), 150.0) == 150
    assert compared_every(math.log(1.26), 1e9) == COMPARED_EVERY


def test_untimed_plans_take_turns_one_step_in_so_many():
    untimed = (StepPlan(2, (1,), 2), StepPlan(8, (1, 2), 8), StepPlan(3, (1,), 3))
    found = plans(SINGLE_PASS, 10 * TIMED_EVERY, untimed)
    tried = [(n, plan) for n, plan in enumerate(found, 1) if plan in untimed]
    assert [n for n, _ in tried] == [TIMED_EVERY * n for n in range(1, 11)]
    assert [plan for _, plan in tried] == [untimed[n % 3] for n in range(10)]


def test_in_two_passes_an_untimed_plan_that_drafts_takes_the_place_of_a_draft_and_others_of_a_verification():
    untimed = (StepPlan(1, (1,), 8), StepPlan(8))
    found = plans(TWO_PASS, 20 * TIMED_EVERY, untimed)
    for before, plan in pairwise(found):
        if plan in untimed:
            assert bool(before.groups) == (plan == untimed[1])
    assert found.count(untimed[0]) >= 8
    assert found.count(untimed[1]) >= 8


def test_a_probe_drafts_a_short_block_and_verifies_it():
    found = plans(AR, 400, probe_every=100)
    drafted = [n for n, plan in enumerate(found) if plan.groups]
    assert all(found[n + 1] == StepPlan(probe_len(K)) for n in drafted)
    gaps = [after - before for before, after in pairwise(drafted)]
    assert gaps[-1] == 101 > gaps[0] > 8
    assert {plan.clean_len for plan in found} == {1, probe_len(K)}


def test_autoregression_with_nothing_to_probe_tries_untimed_plans_alone():
    plan = StepPlan(4, (1,), 4)
    assert set(plans(AR, 3 * TIMED_EVERY)) == {StepPlan(1)}
    found = plans(AR, 3 * TIMED_EVERY, (plan,))
    assert found.count(plan) == 3
    assert set(found) == {StepPlan(1), plan, StepPlan(probe_len(K))}


def test_after_a_long_time_without_drafts_one_step_is_compared_and_not_all_that_were_missed():
    learning, found, pending = LearningSteps(K), [], 1
    for _ in range(10_000):
        learning.next_plan(review_of(AR), 1, ())
    for _ in range(31):
        found.append(learning.next_plan(review_of(SINGLE_PASS), pending, ()))
        pending = 4 if found[-1].groups else 1
    assert found.count(StepPlan(1)) == 1


def test_the_drafts_of_a_probe_are_verified_before_an_untimed_plan_comes():
    untimed, learning, found, pending = StepPlan(4, (1,), 4), LearningSteps(K), [], 1
    for _ in range(20 * TIMED_EVERY):
        found.append(learning.next_plan(review_of(AR, 9), pending, (untimed,)))
        pending = 4 if found[-1].groups else 1
    assert found.count(untimed) >= 18
    assert all(not before.groups for before, plan in pairwise(found) if plan == untimed)


@pytest.mark.parametrize("choice", [AR, TWO_PASS, SINGLE_PASS], ids=lambda choice: choice.mode)
@pytest.mark.parametrize("untimed", [(), (StepPlan(1, (1,), 8), StepPlan(8))], ids=["timed", "untimed"])
@pytest.mark.parametrize(("other", "probe_every"), [(None, 0), (None, 100), (TWO_PASS, 100), (SINGLE_PASS, 0)])
def test_plans_of_a_calm_run_are_the_choices_own(choice, untimed, other, probe_every):
    """So they may be taken without being looked for: the plans, step by step, are the same."""
    sequences, longest, review = [], 0, review_of(choice, probe_every, other)
    for calmly in (False, True):
        learning, found, pending, left, passed = LearningSteps(K), [], 1, 0, 0
        for _ in range(3000):
            own = choice.next_plan(pending)
            if left:
                left, passed = left - 1, passed + 1
                found.append(own)
            else:
                learning.skip(passed, choice.mode)
                passed = 0
                found.append(learning.next_plan(review, pending, untimed))
                if calmly and found[-1] == own:
                    left = learning.calm(review, untimed=bool(untimed))
                    longest = max(longest, left)
            pending = 4 if found[-1].groups else 1
        sequences.append(found)
    assert sequences[0] == sequences[1]
    assert longest >= 32
