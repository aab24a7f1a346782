"""Which rows does a train step read?

Order is arithmetic: the rows of a step follow from (seed, step) alone, so that a run that was killed and resumed, also
on another number of workers, reads exactly what an unbroken one reads. Nothing is shuffled in memory.
"""

__all__ = ["rows_of_step", "seeds_of_step", "shuffled"]

ROUNDS = 4
SEEDS = 2**63
"""Apart from every epoch."""


def rows_of_step(step: int, *, rows_per_step: int, rows: int, seed: int) -> list[int]:
    """Row numbers of train step `step`, from 0; each epoch is one shuffled pass over all `rows`."""
    first = step * rows_per_step
    return [
        shuffled(index % rows, rows, key=_mix(seed, index // rows)) for index in range(first, first + rows_per_step)
    ]


def seeds_of_step(step: int, *, rows_per_step: int, seed: int) -> list[int]:
    """A number for each of the rows of `rows_of_step`, for what is drawn of it; another one each time a row comes."""
    key = _mix(seed, SEEDS)
    return [_mix(key, index) for index in range(step * rows_per_step, (step + 1) * rows_per_step)]


def shuffled(index: int, count: int, key: int) -> int:
    """Where `index` of 0..count-1 goes in the permutation named `key`.

    A Feistel network over the smallest square of a power of two that holds `count`, walked until it lands inside
    (Black and Rogaway 2002): a bijection without a table.
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
    """64 well-mixed bits of two integers (SplitMix64's finaliser)."""
    x = (key * 0x9E3779B97F4A7C15 + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)
