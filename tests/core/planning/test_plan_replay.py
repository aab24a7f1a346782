"""The replay of a record with other plans, against the plans themselves and against chosen luck."""

import random

import pytest
import torch
from simulated_machine import Drafts, FixedCycle, SimulatedText

from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning import plan_replay
from tidar_core.planning.candidate_plans import all_candidates
from tidar_core.planning.draft_history import DraftHistory, Excerpt
from tidar_core.planning.plan_replay import PlanChain, expected_tokens, two_pass_chain

K = 8
PLANS = {
    "two-pass 4": (StepPlan(1, (1,), 4), StepPlan(4)),
    "two-pass 8": (StepPlan(1, (1,), 8), StepPlan(8)),
    "one group": (StepPlan(4, (1,), 4),),
    "one group, more masks": (StepPlan(4, (1,), 7),),
    "two groups": (StepPlan(6, (1, 3), 8),),
    "dense": (StepPlan(8, tuple(range(1, 9)), 8),),
}
TEXTS = {
    "easy": Drafts(easy=0.92, hard=0.92),
    "poor": Drafts(easy=0.4, hard=0.4),
    "in runs": Drafts(easy=0.93, hard=0.3),
    "repeated": Drafts(easy=0.995, hard=0.7, decay=1.0, late=1.0, passage=150, loops=True),
}


def chain(plan):
    cycle = PLANS[plan]
    return two_pass_chain(cycle[1].clean_len, cycle[1].clean_len) if len(cycle) == 2 else PlanChain.of(cycle[0], K)


def decoded(plan, drafts, forwards, seed):
    """The record of texts decoded with one plan, and its accepted length: the mean over verifications."""
    history, luck = DraftHistory(K), random.Random(seed)
    planner, verifications, tokens, text = FixedCycle(PLANS[plan]), 0, 0, None
    for number in range(forwards):
        if text is None:
            text = SimulatedText(str(number), drafts, luck.random(), 400)
        step_plan = planner.next_plan({"text": text.pending}, 0)
        step = text.step(step_plan, K)
        history.observe(step)
        if len(PLANS[plan]) == 1 or step_plan.clean_len > 1:
            verifications, tokens = verifications + 1, tokens + step.accepted
        text = None if step.finish_reason else text
    return history, tokens / verifications


@pytest.fixture(scope="module")
def truth():
    """Accepted length of each plan in texts of each kind, from 15,000 forwards."""
    return {(text, plan): decoded(plan, TEXTS[text], 15_000, 1)[1] for text in TEXTS for plan in PLANS}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_replay_of_a_plan_s_own_record_brings_what_the_plan_brought(truth, text, plan):
    """Some 768 of its newest drafts are replayed. One record is off by up to a tenth, the mean of six by little."""
    found = [
        expected_tokens([chain(plan)], decoded(plan, TEXTS[text], 2500, seed)[0].excerpt(), K)[0] for seed in range(6)
    ]
    assert sum(found) / len(found) == pytest.approx(truth[text, plan], rel=0.1 if text == "repeated" else 0.045)


@pytest.mark.parametrize(
    ("text", "source", "plan", "error"),
    [
        ("easy", "two-pass 8", "two-pass 4", 0.03),
        ("easy", "one group, more masks", "two-pass 4", 0.04),
        ("poor", "one group", "dense", 0.05),
        ("in runs", "two-pass 8", "two-pass 4", 0.06),
        ("in runs", "one group", "dense", 0.06),
        ("repeated", "dense", "one group, more masks", 0.04),
        # whole blocks were verified behind rejections alone, and two thirds of those drafts were accepted
        ("repeated", "one group, more masks", "two-pass 8", 0.06),
    ],
)
def test_a_record_shows_what_other_plans_would_have_brought(truth, text, source, plan, error):
    found = [
        expected_tokens([chain(plan)], decoded(source, TEXTS[text], 2500, seed)[0].excerpt(), K)[0] for seed in range(6)
    ]
    assert sum(found) / len(found) == pytest.approx(truth[text, plan], rel=error)


@pytest.mark.parametrize("plan", PLANS)
def test_the_recursion_is_the_mean_over_drawn_luck(monkeypatch, plan):
    """The other way round: luck is drawn for each place, and the plan is followed draft by draft."""
    luck, rates = (
        random.Random(3),
        torch.tensor([[0.5, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.5, 0.65]], dtype=torch.double),
    )
    monkeypatch.setattr(plan_replay, "fitted_rates", lambda windows, block_len: rates)
    record = [2 * luck.randrange(1, K + 2) + (luck.random() < 0.7) for _ in range(40)]
    forwards, tokens, tested = 0, 0, chain(plan)
    for _ in range(4000):
        drawn = []
        for code in record:
            rate = rates[0, code // 2].item()
            drawn.append(luck.uniform(0, rate) if code % 2 else luck.uniform(rate, 1))
        place, late = 0, 0
        while place < len(record):
            n, drafts = 1, tested.drafts(late)
            while n <= drafts:
                entry = n if late == 0 else K if n == 1 else K + 1
                if place + n - 1 < len(record) and drawn[place + n - 1] >= rates[0, entry]:
                    break
                n += 1
            place, late, forwards = place + n, tested.after[n - 1], forwards + 1
        tokens += place
    assert expected_tokens([tested], Excerpt([record], {0: 1.0}), K)[0] == pytest.approx(tokens / forwards, rel=0.03)


@pytest.mark.parametrize("plan", [two_pass_chain(1, 1), two_pass_chain(1, K), PlanChain.of(StepPlan(K, (1,), 1), K)])
def test_a_plan_that_verifies_no_draft_gives_one_token(plan):
    tested = PlanChain.of(StepPlan(4, (1,)), K)
    excerpt = decoded("dense", TEXTS["in runs"], 300, 0)[0].excerpt()
    alone = expected_tokens([tested], excerpt, K)
    assert expected_tokens([plan, tested], excerpt, K) == pytest.approx([1.0, *alone], rel=1e-5)


def test_windows_count_by_their_weights():
    accepted, rejected = [[2 * (i % 7 + 1) + outcome for i in range(28)] for outcome in (1, 0)]
    dense = [chain("dense")]
    whole, none = (expected_tokens(dense, Excerpt([window], {0: 1.0}), K)[0] for window in (accepted, rejected))
    assert whole == pytest.approx(8, abs=0.1)
    assert none == pytest.approx(1, abs=0.01)
    both = expected_tokens(dense, Excerpt([accepted, rejected], {0: 1.0, 1: 0.5}), K)[0]
    assert both == pytest.approx((28 + 14) / (28 / 8 + 14), rel=0.03)


@pytest.mark.parametrize("verified", [2, 3, 4, 8])
def test_before_any_draft_a_plan_brings_what_it_would_at_even_odds(verified):
    found = expected_tokens([two_pass_chain(verified, verified)], DraftHistory(K).excerpt(), K)[0]
    assert found == pytest.approx(2 - 0.5 ** (verified - 1), rel=0.1)


@pytest.mark.parametrize("block_len", [2, 3, 16])
def test_every_candidate_has_a_forecast_for_every_block_length(block_len):
    history, luck = DraftHistory(block_len), random.Random(4)
    for request in range(40):
        for _ in range(9):
            n = luck.randint(1, block_len)
            history.observe(DecodeStep(str(request), (1,) * n, None, block_len, n, block_len))
    cycles = [x.cycle for x in all_candidates(block_len) if x.mode == "single-pass"]
    found = expected_tokens([PlanChain.of(cycle[0], block_len) for cycle in cycles], history.excerpt(), block_len)
    assert all(1 <= tokens <= cycle[0].clean_len + 0.01 for tokens, cycle in zip(found, cycles, strict=True))
