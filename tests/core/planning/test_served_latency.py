"""Served steps correct the formula: where they were served, near it, and on a machine that changes or pauses."""

import random

import pytest

from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.served_latency import ServedLatency

ROWS, BATCHES, CONTEXTS = (1, 4, 8, 16, 24, 40, 72), (1, 4, 16), (128, 1024, 8192)


def serve(latency, rows, batch, context, drafts, seconds):
    """Observe a step that follows the last one."""
    latency.observe(rows, batch, context, drafts, seconds, latency._now + seconds)


def table_of(seconds):
    points = [
        LatencyPoint(rows=r, batch=b, context=c, seconds=seconds(r, b, c), drafts=r > 8)
        for r in ROWS for b in BATCHES for c in CONTEXTS
    ]  # fmt: skip
    return LatencyTable(tuple(points))


def measured(rows, batch, context):
    """Seconds when the table was measured."""
    return 0.03 + 0.002 * rows * batch + 2e-7 * batch * context


def in_service(rows, batch, context):
    """Seconds in service: another intercept, other slopes."""
    return 0.018 + 0.0035 * rows * batch + 4e-7 * batch * context


def minute_of_traffic(latency, seconds, shapes, noise=0.1, seed=0):
    """Serve a minute of steps of these rows and batches, at contexts that grow; noise is relative, pauses are rare."""
    luck, spent = random.Random(seed), 0.0
    while spent < 60:
        rows, batch = luck.choice(shapes)
        context = luck.randint(100, 1500)
        taken = seconds(rows, batch, context) * luck.gauss(1.0, noise) * (20.0 if luck.random() < 0.002 else 1.0)
        serve(latency, rows, batch, context, rows > 8, taken)
        spent += taken
    latency.refit()


def forecast(latency, rows, batch, context):
    return latency.seconds(rows, batch, context, drafts=rows > 8) * latency.slowdown


@pytest.mark.parametrize("seed", range(3))
def test_after_a_minute_of_traffic_forecasts_are_within_a_tenth_of_the_steps(seed):
    latency, served = ServedLatency(table_of(measured)), [(1, 1), (16, 1), (1, 3), (16, 3), (8, 3)]
    assert max(abs(forecast(latency, r, b, 500) / in_service(r, b, 500) - 1) for r, b in served) > 0.2
    minute_of_traffic(latency, in_service, served, seed=seed)
    for rows, batch in served:
        for context in (200, 500, 1400):
            assert forecast(latency, rows, batch, context) == pytest.approx(in_service(rows, batch, context), rel=0.1)


def test_what_was_not_served_is_corrected_too():
    latency = ServedLatency(table_of(measured))
    minute_of_traffic(latency, in_service, [(1, 1), (16, 1), (1, 4), (16, 4)])
    for rows, batch, context in ((4, 1, 300), (40, 1, 300), (8, 4, 1000), (4, 2, 1000), (24, 8, 1000)):
        before = abs(measured(rows, batch, context) / in_service(rows, batch, context) - 1)
        after = abs(forecast(latency, rows, batch, context) / in_service(rows, batch, context) - 1)
        assert after < max(0.15, 0.5 * before)


def flat_table():
    points = [
        LatencyPoint(rows=rows, batch=1, context=64, seconds=1.0, drafts=drafts)
        for rows in (1, 4, 8, 20) for drafts in (False, True)
    ]  # fmt: skip
    return LatencyTable(tuple(points))


def ratio(latency):
    return latency.seconds(8, 1, 10, drafts=True) / latency.seconds(1, 1, 10)


def test_a_machine_that_slows_down_changes_no_comparison():
    latency = ServedLatency(flat_table())
    for _ in range(50):
        serve(latency, 1, 1, 10, False, 1.0)
        serve(latency, 8, 1, 10, True, 1.2)
    latency.refit()
    assert ratio(latency) == pytest.approx(1.2, rel=0.03)
    for _ in range(500):  # three times slower, and only one shape is served
        serve(latency, 8, 1, 10, True, 3.6)
    latency.refit()
    assert ratio(latency) < 1.2 * 1.3
    assert latency.slowdown * latency.seconds(8, 1, 10, drafts=True) == pytest.approx(3.6, rel=0.1)
    for _ in range(20):  # the other shape is seen again
        serve(latency, 1, 1, 10, False, 3.0)
        serve(latency, 8, 1, 10, True, 3.6)
    latency.refit()
    assert ratio(latency) == pytest.approx(1.2, rel=0.1)


def test_a_pause_of_the_machine_is_no_property_of_a_plan():
    latency = ServedLatency(flat_table())
    for _ in range(50):
        serve(latency, 1, 1, 10, False, 1.0)
        serve(latency, 8, 1, 10, True, 1.2)
    serve(latency, 1, 1, 10, False, 30.0)
    for _ in range(10):
        serve(latency, 1, 1, 10, False, 1.0)
    latency.refit()
    assert ratio(latency) == pytest.approx(1.2, rel=0.05)
    assert latency.slowdown * latency.seconds(1, 1, 10) == pytest.approx(1.0, rel=0.1)


def test_a_clock_that_stands_still_teaches_nothing():
    latency = ServedLatency(flat_table())
    serve(latency, 8, 1, 10, True, 0.0)
    latency.refit()
    assert latency.seconds(8, 1, 10, drafts=True) == flat_table().formula.seconds(8, 1, 10, drafts=True)


def test_only_the_shapes_that_were_served_lately_are_kept():
    latency = ServedLatency(table_of(measured))
    for turn in range(300):
        serve(latency, 1 + turn % 100, 1 + turn % 7, 100, False, 0.05)
    assert len(latency._shapes) == 64
    latency.refit()
    assert latency.seconds(1, 1, 100) > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_speed_of_a_noisy_machine_is_that_of_its_steps_however_many_shapes_are_served(seed):
    """Contexts grow all the time, so new shapes come while the speed of the machine wanders."""
    latency, luck, pace = ServedLatency(table_of(measured)), random.Random(seed), 1.75
    for turn in range(3000):
        pace *= luck.choice((0.98, 1 / 0.98))
        context, batch = 50 + turn % 600, 1 + turn // 300 % 3
        serve(latency, 1, batch, context, False, pace * measured(1, batch, context) * luck.uniform(0.8, 1.2))
        if turn % 100 == 0:
            latency.refit()
    latency.refit()
    assert latency.slowdown == pytest.approx(pace, rel=0.25)
    assert latency.seconds(72, 4, 500, drafts=True) == pytest.approx(measured(72, 4, 500), rel=0.3)


def test_the_doubt_about_a_shape_falls_with_its_steps_at_any_context_and_grows_with_age():
    latency, doubts = ServedLatency(flat_table()), []
    formula = latency.doubt(8, 1, drafts=True)
    for context in (10, 10, 1000, 1000):
        serve(latency, 8, 1, context, True, 1.0)
        doubts.append(latency.doubt(8, 1, drafts=True))
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[-1] < 0.06 < formula
    assert latency.doubt(8, 1, drafts=False) == latency.doubt(8, 2, drafts=True) == formula
    aged = []
    for _ in range(3):
        for _ in range(200):
            serve(latency, 4, 1, 10, True, 0.01)
        aged.append(latency.doubt(8, 1, drafts=True))
    assert doubts[-1] < aged[0] < aged[1] < aged[2]
    serve(latency, 8, 1, 10, True, 1.0)
    assert latency.doubt(8, 1, drafts=True) < doubts[-1]


def seen_now_and_then(seconds, steps=4000):
    """Steps of 16 query tokens, and now and then one of 1 and one of 4, on a machine whose time is `seconds`."""
    latency = ServedLatency(table_of(measured))
    for n in range(steps):
        rows = 1 if n % 64 == 0 else 4 if n % 64 == 32 else 16
        serve(latency, rows, 1, 500, rows > 8, seconds(latency, n, rows))
    return latency


def test_a_step_that_is_run_rarely_is_believed_soon_where_the_machine_changes():
    """Others use the memory: steps of one token get slow, steps of many do not. Then they stop, all at once."""

    def crowded(latency, n, rows):
        return measured(rows, 1, 500) * (1.4 if n < 3000 and rows == 1 else 1.0)

    for steps, factor in ((3000, 1.4), (3000 + 64 * 4, 1.0)):
        latency = seen_now_and_then(crowded, steps)
        latency.refit()
        assert forecast(latency, 1, 1, 500) == pytest.approx(factor * measured(1, 1, 500), rel=0.1)
        assert forecast(latency, 16, 1, 500) == pytest.approx(measured(16, 1, 500), rel=0.05)


def test_how_much_the_machine_changes_is_learned_from_steps_that_are_run_rarely():
    """So on a steady machine little is run to learn from, however noisy it is."""
    luck, pace = random.Random(0), {1: 1.0, 4: 1.0, 16: 1.0}

    def noisy(latency, n, rows):
        return measured(rows, 1, 500) * luck.lognormvariate(0, 0.08)

    def restless(latency, n, rows):
        for of in pace:
            pace[of] *= luck.lognormvariate(0, 0.02)
        return measured(rows, 1, 500) * pace[rows] * luck.lognormvariate(0, 0.03)

    steady, noisy, restless = (
        seen_now_and_then(seconds) for seconds in (lambda latency, n, rows: measured(rows, 1, 500), noisy, restless)
    )
    for margin in (0.05, 0.2):
        long, longer, short = (latency.steady_seconds(margin) for latency in (noisy, steady, restless))
        assert longer > 10 * short
        assert long > 4 * short
    assert steady.steady_seconds(0.2) == 4 * (steady.steady_seconds(0.1))


def test_steps_that_are_very_old_still_have_a_weight():
    latency = ServedLatency(flat_table())
    serve(latency, 8, 1, 10, True, 1.0)
    latency._now = 1e7
    serve(latency, 1, 1, 10, False, 1.0)
    latency.refit()
    assert latency.seconds(8, 1, 10, drafts=True) > 0
