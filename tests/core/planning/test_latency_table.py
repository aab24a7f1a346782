"""The latency table: knees, and the shapes that a measurement covers."""

from tidar_core.decoding.decode_forward import DecodeForward
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable, measure_latency


def test_the_knee_is_the_last_measured_row_count_that_costs_a_quarter_more_at_most():
    points = [
        LatencyPoint(rows=r, batch=b, context=c, seconds=(s + c / 1000) * b)
        for r, s in ((1, 1.0), (8, 1.2), (16, 2.0)) for b in (1, 4) for c in (64, 1024)
    ]  # fmt: skip
    points.append(LatencyPoint(rows=16, batch=1, context=64, seconds=0.5, drafts=True))
    table = LatencyTable(tuple(points))
    assert [table.knee_rows(batch) for batch in (1, 2, 4, 9)] == [8] * 4


def test_a_measured_table_covers_all_requested_shapes(model):
    table = measure_latency(model, rows=(1, 4), batches=(1, 2), contexts=(8, 16), repeats=1)
    assert {(p.rows, p.batch, p.context) for p in table.points} == {
        (r, b, c) for r in (1, 4) for b in (1, 2) for c in (8, 16)
    }
    assert all(point.seconds > 0 for point in table.points)


def test_a_forward_that_takes_longer_than_its_share_of_the_budget_runs_once(model, monkeypatch):
    runs, read = [], DecodeForward.__call__
    monkeypatch.setattr(DecodeForward, "__call__", lambda self, *parts: runs.append(self) or read(self, *parts))
    table = measure_latency(model, rows=(1, 4), contexts=(8,), budget=0.0)
    assert len(runs) == len(table.points) == 2
    runs.clear()
    measure_latency(model, rows=(1, 4), contexts=(8,), repeats=3, budget=60.0)
    assert len(runs) >= 2 * (1 + 3 * 2), "each of three turns has a warm-up and a timed run"
