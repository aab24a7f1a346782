"""`auto` beside every fixed plan: each plan gives the same texts, and the fastest ones take turns."""

import pytest
from decoding import GREEDY, expected_texts, prompts, requests

from tidar_core.config import DraftConfig
from tidar_core.decoding.completion import Completion, complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.planning import plan_benchmark
from tidar_core.planning.candidate_plans import all_candidates
from tidar_core.planning.mode_benchmark import TimedRun
from tidar_core.planning.plan_benchmark import FINALISTS, FixedCycle, compare_plans, name_of, plan_prompts
from tidar_core.planning.step_timing import decoding_latency

K = 4
CANDIDATES = {name_of(candidate): candidate for candidate in all_candidates(K)}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_fixed_plan_gives_the_texts_of_autoregression_and_keeps_to_its_plan(model, name):
    texts, candidate = prompts(9, 4), CANDIDATES[name]
    plans = []

    class Noted(FixedCycle):
        def next_plan(self, pending, context):
            plans.append(super().next_plan(pending, context))
            return plans[-1]

    decoder = Decoder(model, DraftConfig(block_len=K), slots=2)
    done = complete(Scheduler(decoder, Noted(candidate)), requests(texts, GREEDY))
    assert [tuple(completion.token_ids) for completion in done] == expected_texts(model, texts, GREEDY)
    assert set(candidate.cycle) <= set(plans)
    if candidate.mode == "two-pass":
        assert all(verify.clean_len > 1 for verify in plans[1::2])
    if candidate.mode == "single-pass":
        assert sum(plan.clean_len == 1 for plan in plans) <= 2, "only where nothing is pending, as at the beginning"


def test_names_of_candidates_differ():
    assert len(CANDIDATES) == len(all_candidates(K))


def compared(model, repeats, **settings):
    return compare_plans(
        model, prompts(5, 6, 7), GREEDY, block_len=K, batch=1, repeats=repeats, context_len=40,
        table=lambda decoder, longest: decoding_latency(decoder, context_len=longest), **settings,
    )  # fmt: skip


def test_the_fastest_plans_take_turns_with_auto_and_a_slower_turn_changes_no_ratio(model, monkeypatch):
    """Three prompts are two turns, of two and of one prompt; the last of four turns takes four times as long."""
    speeds = {name: 10.0 + n for n, name in enumerate(CANDIDATES)}  # autoregression is slowest, the last one fastest
    names = []

    def timed(decoder, planner, some, sampling, on_prompt):
        names.append(name_of(planner.candidate) if isinstance(planner, FixedCycle) else "auto")
        turn = names[len(CANDIDATES) + 1 :].count(names[-1])  # 0 while plans are tried
        run = TimedRun(seconds=(1, 1, 1, 1, 4)[turn] * len(some) / speeds.get(names[-1], 30.0))
        run.completions = [Completion(text) for text in requests(some, GREEDY)]
        for completion in run.completions:
            completion.token_ids = [0]
        return run

    monkeypatch.setattr(plan_benchmark, "timed_run", timed)
    found = compared(model, repeats=2)
    fastest = list(CANDIDATES)[: -FINALISTS - 1 : -1]
    assert names[len(CANDIDATES) + 1 :] == 4 * list(found.finals)
    assert list(found.tried.items()) == sorted(speeds.items(), key=lambda entry: -entry[1])
    assert list(found.finals) == ["auto", "autoregressive", *fastest]
    assert found.best == fastest[0]
    assert found.finals["auto"] == pytest.approx((30, 30 * 3 / 6))
    assert found.auto_over_best == pytest.approx((30 / speeds[fastest[0]],) * 2)
    assert found.auto_over_ar == pytest.approx((3, 3))


def test_every_prompt_of_a_comparison_is_announced(model):
    seen = []
    found = compared(model, repeats=1, on_prompt=lambda: seen.append(1))
    assert len(seen) == plan_prompts(3, len(CANDIDATES), batch=1, repeats=1)
    assert min(found.tried.values()) > 0
