"""The planner: its choice against brute force, its texts against autoregression."""

import random

import pytest
from decoding import GREEDY, expected_texts, prompts, requests
from simulated_machine import Clock

from tidar_core.config import DraftConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.cuda_graphs import rounded
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.candidate_plans import all_candidates, few_candidates, timed_plans
from tidar_core.planning.decode_step_benchmark import step_plans
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.learning_steps import COMPARED_EVERY
from tidar_core.planning.planner import (
    MIN_SPEEDUP_TO_DRAFT,
    MIN_VERIFICATIONS,
    AutoPlanner,
    planner_of,
)
from tidar_core.planning.reviews import Choice, Review
from tidar_core.planning.step_timing import decoding_latency

K = 4


def taught(planner, whole, late=None):
    """Show the planner many verifications of whole blocks, and of blocks behind a correction.

    whole  rate of each draft of a whole block; entry 0 is not used
    late   rate of every draft behind a correction; by default the rate of a whole block's first draft
    """
    luck, late = random.Random(0), whole[1] if late is None else late
    for _ in range(2000):
        for offset in (0, 1):
            n, drafts = 1, K - offset - 1
            while n <= drafts and luck.random() < (late if offset else whole[n]):
                n += 1
            planner.observe([DecodeStep("taught", (1,) * n, None, K - offset, n, K, mask_offset=offset)])


def simulated_tokens(plan, chance, late_chance, forwards=40_000, whole_blocks=False):
    """Accepted length of a sequence that is decoded draft by draft, mean over verifications."""
    luck, late, tokens, width = random.Random(0), 0, 0, plan.masks(K)
    for _ in range(forwards):
        n, drafts = 1, min(plan.clean_len, width - late) - 1
        while n <= drafts and luck.random() < (late_chance if late else chance[n]):
            n += 1
        tokens += n
        groups = [g for g in plan.groups if g <= n]
        late = 0 if whole_blocks else min(width, n - max(groups)) if groups else width
    return tokens / forwards


def planner_with(table, block_len, *candidates):
    """A planner whose clock stands still, so that the table is the truth."""
    return AutoPlanner(table, block_len, *candidates, clock=lambda: 0.0)


def table_of(seconds_of_rows, batch=1):
    points = (LatencyPoint(rows=rows, batch=batch, context=64, seconds=seconds_of_rows(rows)) for rows in range(1, 21))
    return LatencyTable(tuple(points))


@pytest.mark.parametrize("chance", [[0, 0.05, 0.05, 0.05], [0, 0.6, 0.5, 0.4], [0, 0.95, 0.95, 0.95]])
@pytest.mark.parametrize("row_cost", [0.0, 0.02, 0.1, 1.0])
def test_the_choice_is_the_best_candidate_by_brute_force(chance, row_cost):
    planner = planner_with(table_of(lambda rows: 1.0 + row_cost * rows), K)
    late_chance = 0.3 * chance[1]
    taught(planner, chance, late_chance)
    planner.next_plan({"r": 1}, 10)
    speeds = {}
    for candidate in all_candidates(K):
        mode, cycle = candidate.mode, candidate.cycle
        seconds = sum(1.0 + row_cost * plan.query_tokens(K) for plan in cycle)
        if mode == "single-pass":
            tokens = simulated_tokens(cycle[0], chance, late_chance)
        else:
            tokens = 1.0 if mode == "autoregressive" else 1 + simulated_tokens(
                StepPlan(cycle[1].clean_len, (), cycle[0].width), chance, late_chance, whole_blocks=True
            )  # fmt: skip
        speeds[cycle] = tokens / seconds
    best = max(speeds.values())
    if best > 1.02 * MIN_SPEEDUP_TO_DRAFT * speeds[(StepPlan(1),)]:  # the simulation has an error of 1 %
        assert speeds[planner.choice.cycle] >= best / 1.02
    else:
        assert planner.choice.mode == "autoregressive" or speeds[planner.choice.cycle] >= best / 1.02


def test_hopeless_drafts_and_costly_rows_mean_autoregression():
    planner = planner_with(table_of(lambda rows: float(rows)), K)
    taught(planner, [0.0] * K)
    assert planner.next_plan({"a": 1, "b": 1}, 10) == StepPlan(1)
    assert planner.choice.mode == "autoregressive"


def test_free_rows_and_good_drafts_mean_single_pass_with_every_group():
    planner = planner_with(table_of(lambda rows: 1.0), K)
    taught(planner, [0.9] * K)
    planner.next_plan({"r": 4}, 10)
    assert planner.choice.cycle == (StepPlan(4, (1, 2, 3, 4), 4),)


def test_autoregression_tries_a_block_now_and_then_and_can_be_won_back():
    planner = planner_with(table_of(lambda rows: 1.0 + 0.01 * rows), K)
    taught(planner, [0.0] * K)
    plans = []
    pending = 1
    for _ in range(3000):
        plan = planner.next_plan({"r": pending}, 10)
        plans.append(plan)
        n = plan.clean_len  # every draft is accepted from now on
        planner.observe([DecodeStep("r", (1,) * n, None, pending, n, n)])
        pending = plan.masks(K) if plan.groups else 1
    assert plans[0] == StepPlan(1)
    assert planner.choice.mode != "autoregressive"


@pytest.mark.parametrize("block_len", [2, 4, 8, 16])
@pytest.mark.parametrize("all_accepted", [True, False])
def test_a_text_whose_drafts_are_always_or_never_accepted_can_be_planned_for_ever(block_len, all_accepted):
    planner, pending = planner_with(table_of(lambda rows: 1.0), block_len), 1
    for _ in range(3000):
        plan = planner.next_plan({"r": pending}, 10)
        n = min(plan.clean_len, pending) if all_accepted else 1
        planner.observe([DecodeStep("r", (1,) * n, None, pending, n, plan.clean_len)])
        pending = plan.masks(block_len) if plan.groups else 1
    assert (planner.choice.mode == "autoregressive") == (not all_accepted)


def test_drafting_must_promise_clearly_more_than_autoregression():
    planner = planner_with(table_of(lambda rows: 1.0 + 0.1 * rows), K)
    taught(planner, [0.3] * K)
    weighed = planner.weigh(["r"], 10)
    best = max(choice.tokens_per_second for choice in weighed) / weighed[0].tokens_per_second
    assert 1 < best < MIN_SPEEDUP_TO_DRAFT
    assert planner.next_plan({"r": 1}, 10) == StepPlan(1)


@pytest.mark.parametrize(
    ("present", "other", "mode"),
    [
        (1.01, 1.01, "two-pass"),  # drafting goes on while it promises more than autoregression
        (0.99, 0.98, "autoregressive"),
        (0.99, 1.005, "autoregressive"),  # not even a better choice promises enough to begin with it
        (0.99, 1.03, "single-pass"),
        (None, 1.01, "autoregressive"),
        (None, 1.03, "single-pass"),
    ],
)
def test_drafting_begins_for_a_gain_of_a_fiftieth_and_goes_on_for_any(monkeypatch, present, other, mode):
    planner = planner_with(table_of(lambda rows: 1.0), K)
    ar, *drafting = all_candidates(K)
    two_pass, single_pass = (next(x for x in drafting if x.mode == name) for name in ("two-pass", "single-pass"))
    promised = [Choice("autoregressive", ar.cycle, 100.0), Choice("single-pass", single_pass.cycle, 100 * other)]
    promised.append(Choice("two-pass", two_pass.cycle, 100 * (present or 0.5)))
    monkeypatch.setattr(planner, "weigh", lambda *given, **how: promised)
    held = promised[0] if present is None else promised[2]
    assert planner._reviewed(["r"], 10, Review(held, 100.0, 0, ()), alike=True).choice.mode == mode


def test_a_batch_that_comes_back_is_not_weighed_anew(monkeypatch):
    planner = planner_with(table_of(lambda rows: 1.0), K)
    weighed = []
    weigh = planner.weigh
    monkeypatch.setattr(
        planner, "weigh", lambda requests, *of, **how: weighed.append(len(requests)) or weigh(requests, *of, **how)
    )
    for batch in (5, 6, 5, 6):
        planner.next_plan({str(i): 1 for i in range(batch)}, 10)
    assert weighed == [5, 6]


def test_a_request_that_runs_alone_is_weighed_by_its_own_drafts():
    planner = planner_with(table_of(lambda rows: 1.0 + 0.1 * rows), K)
    taught(planner, [0.5] * K)
    for request, n in (("good", 4), ("bad", 1)):
        for _ in range(200):
            planner.observe([DecodeStep(request, (1,) * n, None, 4, n, 4)])
    planner.next_plan({"bad": 1, "good": 1}, 10)
    assert planner.next_plan({"bad": 1}, 10) == StepPlan(1)
    assert planner.choice.mode == "autoregressive"
    for _ in range(200):
        planner.observe([DecodeStep("good", (1,) * 4, None, 4, 4, 4)])
    planner.next_plan({"good": 4}, 10)
    assert planner.choice.mode != "autoregressive"
    planner.next_plan({"new": 1}, 10)
    assert len(planner.history) <= 2


def test_lone_requests_that_are_new_share_a_review(monkeypatch):
    planner = planner_with(table_of(lambda rows: 1.0 + 0.1 * rows), K)
    weighed = []
    weigh = planner.weigh
    monkeypatch.setattr(
        planner, "weigh", lambda requests, *of, **how: weighed.append(set(requests)) or weigh(requests, *of, **how)
    )
    taught(planner, [0.5] * K)
    for request in ("first", "second"):
        for _ in range(10):
            planner.next_plan({request: 4}, 10)
            planner.observe([DecodeStep(request, (1, 1), None, 4, 2, 4)])
    assert weighed == [{"first"}, {"first"}, {"second"}], "reviews are due after 0, 4 and 12 steps, for both alike"
    for _ in range(MIN_VERIFICATIONS):
        planner.observe([DecodeStep("second", (1, 1), None, 4, 2, 4)])
    planner.next_plan({"second": 4}, 10)
    assert weighed[3:] == [{"second"}]


def test_the_review_of_one_request_and_that_of_all_take_turns_and_do_not_mix(monkeypatch):
    """Reviews are so slow that few are due in time; neither of the two may wait for ever."""
    planner = planner_with(table_of(lambda rows: 1.0 + 0.1 * rows), K)
    alike, weigh = [], planner.weigh
    monkeypatch.setattr(planner, "weigh", lambda *of, **how: alike.append(how["alike"]) or weigh(*of, **how))
    taught(planner, [0.7] * K)
    for _ in range(300):
        planner.observe([DecodeStep("bad", (1,), None, 4, 1, 4)])
    for step in range(4000):
        planner.next_plan({"bad": 1}, 10)
        planner.reviews._reviewing = 1e9 if step % 300 else 0.0
        planner.reviews.look_again()
    assert min(alike.count(True), alike.count(False)) >= 5
    assert abs(alike.count(True) - alike.count(False)) <= 2
    of_all, of_one = (planner.reviews._found[key].review.choice for key in (1, frozenset({"bad"})))
    assert of_one.mode == "autoregressive" != of_all.mode


def test_nothing_is_kept_of_requests_that_finished_or_were_aborted():
    planner = planner_with(table_of(lambda rows: 1.0), K)
    for turn in range(50):
        running = {f"{turn}-{i}": 4 for i in range(6)}
        planner.next_plan(running, 10)
        reasons = ["stop", "length", "length", None, None, None]  # the last three are aborted after this step
        planner.observe([DecodeStep(r, (1,), reason, 4, 1, 4) for r, reason in zip(running, reasons)])
        assert len(planner.history) <= 2 * len(running) + 3
        planner.learn()
        finished = [r for r, reason in zip(running, reasons) if reason]
        assert [planner.history.verifications(r) for r in finished] == [0, 0, 0]
    for turn in range(50):
        planner.next_plan({f"alone-{turn}": 1}, 10)
    assert len(planner.history) <= 2
    assert len(planner.reviews._found) <= 2


@pytest.mark.parametrize(("drafting", "expected"), [(1.0, "drafts"), (30.0, "autoregressive")])
def test_a_table_that_flatters_drafts_is_found_out_by_the_steps_that_are_served(drafting, expected):
    """The table gives all steps the same time; in truth steps with more query tokens take `drafting` times as long."""
    clock = Clock()
    planner = AutoPlanner(table_of(lambda rows: 1.0), K, clock=clock)
    pending, modes = 1, []
    for _ in range(8 * COMPARED_EVERY):
        plan = planner.next_plan({"r": pending}, 10)
        clock.run(1.0 if plan == StepPlan(1) else drafting)
        n = min(plan.clean_len, pending)
        planner.observe([DecodeStep("r", (1,) * n, None, pending, n, n)])  # every draft is accepted
        pending = plan.masks(K) if plan.groups else 1
        modes.append(planner.choice.mode)
    assert modes[0] != "autoregressive"
    assert (modes[-1] == "autoregressive") == (expected == "autoregressive")


@pytest.mark.parametrize("row_cost", [0.0, 0.05, 1.0])
def test_auto_gives_the_autoregressive_text_whatever_it_chooses(model, row_cost):
    texts = prompts(5, 12, 3, 8)
    planner = planner_with(table_of(lambda rows: 1.0 + row_cost * rows), K)
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=K), slots=3), planner)
    found = [tuple(c.token_ids) for c in complete(scheduler, requests(texts, GREEDY))]
    assert found == expected_texts(model, texts, GREEDY)


@pytest.mark.parametrize("rows", [1, 3])
def test_auto_with_a_block_of_one_token_has_nothing_to_draft_or_probe(model, rows):
    texts, decoder = prompts(5, 12, 3, 8), Decoder(model, DraftConfig(block_len=1), slots=rows)
    planner = planner_of("auto", decoder, decoding_latency(decoder, context_len=16, repeats=1))
    assert not planner.drafts_first_blocks
    found = [tuple(c.token_ids) for c in complete(Scheduler(decoder, planner), requests(texts, GREEDY))]
    assert found == expected_texts(model, texts, GREEDY)
    assert planner.facts()["plans"] == [{"verified": 1, "groups": [], "masks": 1}]


@pytest.mark.parametrize("block_len", [1, 2, 3, 8, 16])
def test_the_steps_that_are_timed_exist_and_name_each_plan_once(block_len):
    shapes = [shape.plan for shape in step_plans(block_len)]
    assert len(set(shapes)) == len(shapes)
    assert all(set(plan.groups) <= set(range(1, plan.clean_len + 1)) for plan in shapes)


@pytest.mark.parametrize("block_len", [1, 2, 3, 8, 16])
def test_every_candidate_is_valid_and_each_is_there_once(block_len):
    for candidates in (few_candidates(block_len), all_candidates(block_len)):
        assert candidates[0].cycle == (StepPlan(1),)
        assert len({candidate.cycle for candidate in candidates}) == len(candidates)
        for plan in timed_plans(candidates):
            assert 1 <= plan.clean_len <= block_len
            assert plan.masks(block_len) <= block_len
            assert set(plan.groups) <= set(range(1, plan.clean_len + 1))
    assert set(timed_plans(few_candidates(block_len))) <= set(timed_plans(all_candidates(block_len))) | {
        StepPlan(block_len)
    }


def test_where_steps_are_captured_only_few_candidates_are_weighed_all_of_them_timed():
    planner = planner_with(table_of(lambda rows: 1.0 + 0.01 * rows), 16, few_candidates(16))
    assert [choice.cycle for choice in planner.weigh(["r"], 10)] == [
        candidate.cycle for candidate in few_candidates(16)
    ]
    assert len(timed_plans(few_candidates(16))) < 20


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (2, 8), (8, 8), (9, 64), (65, 100), (100, 100)])
def test_shapes_are_rounded_up_to_few(count, expected):
    assert rounded(count, 100, 8) == expected


@pytest.mark.parametrize("queued", [False, True])
def test_a_step_that_waits_for_a_prefill_teaches_nothing_about_its_plan(queued):
    clock = Clock()
    planner = AutoPlanner(table_of(lambda rows: 1.0 + 0.1 * rows), K, queued=queued, clock=clock)
    for prefilled in [False, True] * 20:
        if prefilled:
            planner.begin_prefill()
            planner.end_prefill()
        plan = planner.next_plan({"r": 1}, 10)
        clock.run((1.0 + 0.1 * plan.query_tokens(K)) * (3.0 if prefilled else 1.0))
        planner.observe([DecodeStep("r", (1,), None, 1, 1, 1)])
    assert (planner.latency.slowdown < 1.05) == queued


def test_a_forward_that_read_prompts_teaches_their_time_and_not_that_of_its_plan():
    clock = Clock()
    planner = AutoPlanner(table_of(lambda rows: 1.0 + 0.1 * rows), K, clock=clock)
    for beside in [False, True] * 20:
        plan = planner.next_plan({"r": 1}, 10)
        clock.run((1.0 + 0.1 * plan.query_tokens(K)) + 2.0 * beside)
        planner.observe([DecodeStep("r", (1,), None, 1, 1, 1)], beside=beside)
    assert planner.latency.slowdown == pytest.approx(1.0, abs=0.02)
    assert planner.loop.token_seconds == pytest.approx(1.0, rel=0.05), "two seconds for every second token"


def test_a_caller_may_extend_its_list_of_steps_after_it_was_observed():
    """A scheduler adds the first tokens of prompts, which are no part of the decode step."""
    planner = planner_with(table_of(lambda rows: 1.0), K)
    for _ in range(5):
        planner.next_plan({"a": 4}, 10)
        planner.observe(steps := [DecodeStep("a", (1,), None, 4, 1, 4)])
        steps.append(DecodeStep("b", (1,), "stop", 0, 0, 0))
    planner.learn()
    assert planner.history.verifications("a") == 5
    assert planner.loop.texts_per_token == 0.0
