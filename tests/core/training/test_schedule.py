"""Linear warm-up, then half a cosine, over steps or over a share of the budget."""

import pytest

from tidar_core.training.schedule import Schedule

SCHEDULE = Schedule(peak=1.0, minimum=0.2, warmup=0.2)


def test_steps_warm_up_then_fall_along_a_cosine_to_the_minimum():
    rates = [SCHEDULE.at_step(step, 11) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.2 + 0.8 * 0.5)  # half of the eight steps from 2 to 10
    assert rates[10] == pytest.approx(0.2)


def test_a_share_of_the_budget_gives_the_same_curve():
    assert [SCHEDULE.at_share(x) for x in (0, 0.1, 0.2, 0.6, 1, 1.5)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])
    for step in range(2000, 10_000, 500):
        assert SCHEDULE.at_share(step / 10_000) == pytest.approx(SCHEDULE.at_step(step, 10_000), abs=1e-3)


def test_no_warm_up_begins_at_the_peak():
    flat = Schedule(peak=1.0, minimum=0.0, warmup=0.0)
    assert flat.at_share(0) == 1.0
    assert flat.at_step(0, 100) == 1.0
