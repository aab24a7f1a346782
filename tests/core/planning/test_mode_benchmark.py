"""Modes are compared within a repeat, and on all the prompts."""

from dataclasses import replace

import pytest
from decoding import GREEDY, prompts

from tidar_core.planning import mode_benchmark
from tidar_core.planning.mode_benchmark import compare_modes, prompts_in_all


def test_a_ratio_is_taken_within_each_repeat(model, monkeypatch):
    """A machine that is half as fast in the second repeat changes no ratio, and moves the median speed."""
    seconds = iter([1.0, 1.0, 4.0, 2.0, 8.0, 4.0, 4.0, 1.0])  # to warm up, then three repeats, of both modes
    run = mode_benchmark.timed_run

    def timed(*arguments):
        done = run(*arguments)
        done.seconds = next(seconds)
        return done

    monkeypatch.setattr(mode_benchmark, "timed_run", timed)
    modes = ("autoregressive", "single-pass")
    found = compare_modes(model, prompts(5, 9), GREEDY, block_len=4, repeats=3, modes=modes)
    ar, drafted = (found[mode] for mode in modes)
    assert (ar.over_ar, ar.over_ar_spread) == (1, (1, 1))
    assert drafted.over_ar == pytest.approx(2)
    assert drafted.over_ar_spread == pytest.approx((2, 4))
    assert (ar.tokens_per_second, drafted.tokens_per_second) == pytest.approx((48 / 4, 48 / 2))
    assert ar.tokens_per_second_spread == pytest.approx((48 / 8, 48 / 4))


def test_a_fixed_mode_warms_up_with_a_few_tokens_and_auto_learns_from_whole_texts(model, monkeypatch):
    run, lengths = mode_benchmark.timed_run, []

    def noted(decoder, planner, prompts, sampling, on_prompt):
        lengths.append(sampling.max_tokens)
        return run(decoder, planner, prompts, sampling, on_prompt)

    monkeypatch.setattr(mode_benchmark, "timed_run", noted)
    modes = ("autoregressive", "single-pass", "auto")
    compare_modes(model, prompts(5), replace(GREEDY, max_tokens=12), block_len=4, repeats=1, modes=modes)
    assert lengths == [8, 8, 12, 12, 12, 12]


def test_every_prompt_is_continued_once_a_repeat_and_a_batch_of_them_to_warm_up(model):
    finished = []
    compare_modes(
        model, prompts(5, 9, 4), GREEDY, block_len=4, batch=2, repeats=2, on_prompt=lambda: finished.append(1)
    )
    assert len(finished) == prompts_in_all(3, modes=3, batch=2, repeats=2) == 3 * (2 + 2 * 3)
