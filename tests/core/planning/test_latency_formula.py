"""The formula of step times: it meets shapes that it was not fitted to, on a GPU's figures and on simple sums."""

import pytest
from simulated_machine import gpu_seconds

from tidar_core.planning.latency_formula import LatencyFormula, LatencyPoint, Weighted

ROWS = (1, 16, 17, 32, 48, 80, 144, 272)
MEASURED = {
    (1, 512): (6.60, 6.92, 7.24, 7.43, 7.55, 7.75, 8.35, 9.62),
    (8, 512): (7.02, 7.64, 8.25, 9.32, 11.29, 16.99, 29.10, 56.55),
    (1, 4096): (6.81, 7.40, 7.60, 7.84, 8.03, 8.17, 9.14, 11.48),
    (8, 4096): (8.31, 8.95, 9.85, 11.00, 14.14, 21.39, 37.15, 67.14),
}
"""Milliseconds of the decode steps of an 8B model on one H200, by batch and context (docs/performance.md)."""
GPU = [
    LatencyPoint(rows=rows, batch=batch, context=context, seconds=ms / 1000, drafts=rows not in (1, 16))
    for (batch, context), times in MEASURED.items() for rows, ms in zip(ROWS, times)
]  # fmt: skip


def forecast(formula, point):
    return formula.seconds(point.rows, point.batch, point.context, drafts=point.drafts)


def errors(formula, points):
    return [forecast(formula, point) / point.seconds - 1 for point in points]


def test_the_formula_meets_measured_steps_of_a_gpu_that_it_has_not_seen():
    unseen = [p for p in GPU if p.rows in (17, 48, 144) or (p.batch, p.context) == (8, 4096)]
    found = errors(LatencyFormula.of([p for p in GPU if p not in unseen]), unseen)
    assert max(map(abs, found)) < 0.15
    assert sum(map(abs, found)) / len(found) < 0.05


def shape(rows, batch, context, seconds):
    return LatencyPoint(rows=rows, batch=batch, context=context, seconds=seconds)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda rows, batch, context: 0.03,
        lambda rows, batch, context: 0.03 + 0.005 * rows * batch,
        lambda rows, batch, context: 0.01 + 0.002 * max(0, rows * batch - 64) + 1e-6 * batch * context,
        lambda rows, batch, context: 0.001 * min(rows * batch, 4) + 1e-7 * rows * batch * context,
    ],
)
def test_a_sum_of_its_terms_is_found_again_between_and_beyond_the_measured_shapes(seconds):
    measured = [shape(r, b, c, seconds(r, b, c)) for b in (1, 4) for c in (100, 2000) for r in (1, 2, 8, 16, 40, 72)]
    formula = LatencyFormula.of(measured)
    for rows, batch, context in ((4, 1, 500), (72, 8, 100), (1, 32, 100), (8, 16, 4000), (40, 2, 8000)):
        assert formula.seconds(rows, batch, context) == pytest.approx(seconds(rows, batch, context), rel=0.08)


def test_more_of_anything_never_takes_less_time():
    formula = LatencyFormula.of([p for p in GPU if p.batch == 1])
    known = formula.seconds(8, 8, 1000)
    assert all(formula.seconds(*more) >= known for more in ((9, 8, 1000), (8, 9, 1000), (8, 8, 2000), (500, 64, 9000)))
    assert formula.seconds(8, 8, 1000, drafts=True) >= known


def test_one_measured_step_makes_a_formula():
    assert LatencyFormula.of([shape(1, 1, 128, 0.5)]).seconds(1, 1, 128) == pytest.approx(0.5, rel=0.01)


def test_a_later_measurement_moves_the_costs_it_concerns_and_little_else():
    table = LatencyFormula.of([shape(r, b, 100, gpu_seconds(r, b, 100)) for b in (1, 8, 64) for r in (1, 4, 16, 80)])
    slow = [Weighted(shape(r, 1, 100, 2 * gpu_seconds(r, 1, 100)), 0.02) for r in (1, 16)]
    fitted = table.fitted(slow, spread=0.5)
    assert fitted.seconds(16, 1, 100) == pytest.approx(2 * gpu_seconds(16, 1, 100), rel=0.05)
    assert fitted.seconds(80, 64, 100) == pytest.approx(gpu_seconds(80, 64, 100), rel=0.3)
    vague = table.fitted([Weighted(weighted.point, 20.0) for weighted in slow], spread=0.5)
    assert vague.seconds(16, 1, 100) == pytest.approx(gpu_seconds(16, 1, 100), rel=0.05)
