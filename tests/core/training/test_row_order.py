"""Row order is arithmetic: each row once an epoch, the same for any number of workers."""

from collections import Counter
from itertools import pairwise

import pytest

from tidar_core.training.row_order import rows_of_step, seeds_of_step, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_a_shuffle_is_a_permutation(count, key):
    assert sorted(shuffled(i, count, key) for i in range(count)) == list(range(count))


def test_other_keys_give_other_orders():
    orders = {tuple(shuffled(i, 50, key) for i in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


def test_neighbours_are_torn_apart():
    order = [shuffled(i, 1000, 7) for i in range(1000)]
    near = sum(abs(a - b) < 10 for a, b in pairwise(order))
    assert near < 60  # about 19 by chance


def test_an_epoch_reads_every_row_once_even_across_steps():
    rows = [row for step in range(20) for row in rows_of_step(step, rows_per_step=7, rows=28, seed=3)]
    for epoch in range(5):
        assert sorted(rows[28 * epoch : 28 * (epoch + 1)]) == list(range(28))
    assert rows[:28] != rows[28:56]


def test_a_step_that_spans_two_epochs_reads_from_both():
    rows = [row for step in range(5) for row in rows_of_step(step, rows_per_step=4, rows=10, seed=0)]
    assert Counter(rows) == dict.fromkeys(range(10), 2)


def test_a_step_depends_on_seed_and_step_alone():
    step = rows_of_step(123_456_789, rows_per_step=4, rows=12_000_000, seed=5)
    assert step == rows_of_step(123_456_789, rows_per_step=4, rows=12_000_000, seed=5)
    assert step != rows_of_step(123_456_789, rows_per_step=4, rows=12_000_000, seed=6)
    assert all(0 <= row < 12_000_000 for row in step)


def test_what_is_drawn_of_a_row_follows_from_seed_step_and_place_and_never_comes_twice():
    seeds = [seed for step in range(50) for seed in seeds_of_step(step, rows_per_step=4, seed=5)]
    assert seeds[8:12] == seeds_of_step(2, rows_per_step=4, seed=5)
    assert seeds[8:12] == seeds_of_step(1, rows_per_step=8, seed=5)[:4]
    assert len({*seeds, *seeds_of_step(0, rows_per_step=200, seed=6)}) == 400
