"""The latency table: linear between measured shapes, one curve for steps that draft."""

import pytest

from tidar_core.planning.latency_table import LatencyPoint, LatencyTable, measure_latency


def test_latency_is_linear_between_measured_rows():
    table = LatencyTable(
        tuple(LatencyPoint(rows=r, batch=1, context=64, seconds=s) for r, s in ((1, 1.0), (8, 1.2), (16, 2.0)))
    )
    assert table.seconds(12, 1, 50) == pytest.approx(1.6)
    assert table.seconds(24, 1, 50) == pytest.approx(2.8)
    assert table.seconds(1, 9, 5000) == 1.0
    assert table.knee_rows() == 8


def test_latency_is_linear_between_measured_batches_and_contexts():
    points = [
        LatencyPoint(rows=r, batch=b, context=c, seconds=b + c / 100 + r / 1000)
        for r in (1, 5) for b in (1, 4, 16) for c in (100, 500)
    ]  # fmt: skip
    table = LatencyTable(tuple(points))
    assert table.seconds(3, 2, 200) == pytest.approx(2 + 2 + 0.003)
    assert table.seconds(5, 10, 500) == pytest.approx(10 + 5 + 0.005)
    assert table.seconds(1, 99, 9000) == pytest.approx(16 + 5 + 0.001)
    assert table.seconds(1, 1, 0) == pytest.approx(1 + 1 + 0.001)


def test_steps_that_draft_have_a_curve_of_their_own():
    points = [LatencyPoint(rows=r, batch=1, context=64, seconds=1.0 + r, drafts=d) for r in (1, 5) for d in (False,)]
    points += [LatencyPoint(rows=r, batch=1, context=64, seconds=2.0 + r, drafts=True) for r in (3, 5)]
    table = LatencyTable(tuple(points))
    assert (table.seconds(4, 1, 9), table.seconds(4, 1, 9, drafts=True)) == (5.0, 6.0)
    assert LatencyTable(tuple(points[:2])).seconds(4, 1, 9, drafts=True) == 5.0


def test_a_measured_table_covers_all_requested_shapes(model):
    table = measure_latency(model, rows=(1, 4), batches=(1, 2), contexts=(8, 16), repeats=1)
    assert {(p.rows, p.batch, p.context) for p in table.points} == {
        (r, b, c) for r in (1, 4) for b in (1, 2) for c in (8, 16)
    }
    assert all(point.seconds > 0 for point in table.points)
