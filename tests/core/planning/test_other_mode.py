"""Steps of the mode that the choice is not: they verify drafts that the choice never verifies."""

import pytest

from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.candidate_plans import Candidate
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.learning_steps import FIRST_OTHER, OTHER_STEPS, LearningSteps, probe_len
from tidar_core.planning.planner import AutoPlanner
from tidar_core.planning.reviews import Choice, Review

K = 4


def planner():
    """A planner whose clock stands still."""
    point = LatencyPoint(rows=1, batch=1, context=64, seconds=1.0)
    return AutoPlanner(LatencyTable((point,)), K, clock=lambda: 0.0)


def test_for_a_few_steps_now_and_then_the_other_mode_takes_the_place_of_the_choice():
    """The gap doubles, up to the one that the caller gives."""
    draft, verify = StepPlan(1, (1,), 6), StepPlan(6)
    choice, other = Choice("single-pass", (StepPlan(4, (1,), 4),), 3.0), Candidate("two-pass", (draft, verify))
    review, learning, found, pending = Review(choice, 1.0, 0, (), other, 700, 10_000), LearningSteps(8), [], 1
    learning._next_comparison = 10_000  # no autoregressive step takes their place
    for _ in range(4000):
        found.append(learning.next_plan(review, pending, ()))
        pending = 4 if found[-1].groups else 1
    others = [n for n, plan in enumerate(found, 1) if plan in (draft, verify)]
    begins = [n for n in others if n - 1 not in others]
    assert begins == [64, 128, 256, 512, 1024, 1724, 2424, 3124, 3824]
    assert FIRST_OTHER == 64
    for begin in begins:  # drafts of the choice are pending: they are verified first
        assert found[begin - 1 : begin - 1 + OTHER_STEPS] == [verify, draft] * (OTHER_STEPS // 2)
    assert len(others) == OTHER_STEPS * len(begins)


@pytest.mark.parametrize(
    ("mode", "promise", "found"),
    [("two-pass", 2.5, 666), ("two-pass", 2.9, 400), ("two-pass", 2.0, 0), ("single-pass", 2.9, 0)],
)
def test_the_best_of_the_other_mode_is_run_now_and_then_if_it_promises_nearly_as_much(
    monkeypatch, mode, promise, found
):
    """Otherwise drafts that the choice never verifies are never known. The steps cost 0.2 % of the time."""
    auto, calls = planner(), []
    ar, best, *rest = (
        Choice("autoregressive", (StepPlan(1),), 1.0), Choice("single-pass", (StepPlan(4, (1,), 4),), 3.0),
        Choice("two-pass", (StepPlan(1, (1,), 2), StepPlan(2)), 1.5),
        Choice(mode, (StepPlan(1, (1,), 4), StepPlan(4)), promise),
    )  # fmt: skip
    monkeypatch.setattr(auto, "weigh", lambda *of, **how: [ar, best, *rest])
    next_plan = auto._learning.next_plan
    monkeypatch.setattr(auto._learning, "next_plan", lambda *given: calls.append(given) or next_plan(*given))
    auto.next_plan({"r": 1}, 10)
    ((review, _, _),) = calls
    assert (review.choice, review.other, review.other_every) == (best, rest[-1] if found else None, found)


def test_an_autoregressive_choice_runs_no_other_mode(monkeypatch):
    auto = planner()
    choices = [Choice("autoregressive", (StepPlan(1),), 3.0), Choice("single-pass", (StepPlan(4, (1,), 4),), 2.9)]
    monkeypatch.setattr(auto, "weigh", lambda *of, **how: choices)
    auto.next_plan({"r": 1}, 10)
    review, _ = auto.reviews.holding({"r": 1}.keys())
    assert (review.choice, review.other, review.other_every) == (choices[0], None, 0)


def calm_planner(monkeypatch, *choices):
    """A planner within a run of steps of its choice, and how often it looked for a plan since."""
    auto, looks = planner(), []
    monkeypatch.setattr(auto, "weigh", lambda *of, **how: list(choices))
    auto.next_plan({"r": 1}, 10)
    assert auto._calm.left > 0
    look = auto._weighed_plan
    monkeypatch.setattr(auto, "_weighed_plan", lambda *given: looks.append(given) or look(*given))
    return auto, looks


AR_CHOICE = Choice("autoregressive", (StepPlan(1),), 3.0)


def test_a_run_of_steps_ends_with_its_requests_or_its_drafts(monkeypatch):
    for end in (
        lambda auto: {"other": 1},
        lambda auto: {"r": 1, "other": 1},
        lambda auto: auto.forget_drafts() or {"r": 1},
    ):
        auto, looks = calm_planner(monkeypatch, AR_CHOICE)
        auto.next_plan({"r": 1}, 10)
        assert not looks
        auto.next_plan(end(auto), 10)
        assert len(looks) == 1


def test_drafts_that_are_pending_in_an_autoregressive_run_are_verified(monkeypatch):
    """An autoregressive step drafts as well where diffusion is trusted."""
    auto, _ = calm_planner(monkeypatch, AR_CHOICE)
    assert auto.next_plan({"r": 1}, 10) == StepPlan(1)
    assert auto.next_plan({"r": 4}, 10) == StepPlan(probe_len(auto.block_len))
