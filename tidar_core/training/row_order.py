"""Order of the rows that train steps read.

The order is computed: the rows of a train step follow from (seed, step) alone. So a resumed run reads exactly the rows
of an uninterrupted run, even on another number of workers. Nothing is shuffled in memory.
"""

__all__ = ["rows_of_step", "seeds_of_step", "shuffled"]

ROUNDS = 4
"""Rounds of the Feistel network."""
SEEDS = 2**63
"""Stream of the rows' seeds; no epoch has this number."""


def rows_of_step(step: int, *, rows_per_step: int, rows: int, seed: int) -> list[int]:
    """Row numbers that train step `step` reads, from 0; each epoch is one shuffled pass over all `rows`."""
    first = step * rows_per_step
    return [
        shuffled(index % rows, rows, key=_mix(seed, index // rows)) for index in range(first, first + rows_per_step)
    ]


def seeds_of_step(step: int, *, rows_per_step: int, seed: int) -> list[int]:
    """Seed for the draws of each row of `rows_of_step`; a row has another seed in every epoch."""
    key = _mix(seed, SEEDS)
    return [_mix(key, index) for index in range(step * rows_per_step, (step + 1) * rows_per_step)]


def shuffled(index: int, count: int, key: int) -> int:
    """Image of `index` in 0..count-1 under the permutation number `key`.

    The permutation is a Feistel network over the smallest square of a power of two that holds `count`. It is repeated
    until its image is below `count` (Black and Rogaway 2002): a bijection without a table.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(key, (turn << half_bits) | right) & low)
        index = (left << half_bits) | right
        if index < count:
            return index


def _mix(key: int, value: int) -> int:
    """Hash of two integers to 64 bits (SplitMix64's finaliser)."""
    x = (key * 0x9E3779B97F4A7C15 + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)
