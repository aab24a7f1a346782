"""A machine whose clock is a formula, and texts whose drafts are accepted by chance."""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

from tidar_core.config import DraftConfig
from tidar_core.decoding.request import DecodeStep


@dataclass
class Clock:
    """Seconds that pass only when something is run."""

    now: float = 0.0
    runs: int = 0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.now += seconds
        self.runs += 1


def gpu_seconds(rows, batch, context):
    """An 8B model in bf16 on an H200: docs/performance.md, qwen3-8b at context 512, by query tokens in total."""
    known = {0: 6.55, 16: 6.92, 32: 7.43, 80: 7.75, 144: 8.35, 272: 9.62, 384: 11.29, 640: 16.99, 1152: 29.1,
             2176: 56.55}  # fmt: skip
    queries, points = rows * batch, list(known.items())
    (low, at_low), (high, at_high) = next(((a, b) for a, b in pairwise(points) if queries <= b[0]), points[-2:])
    compute = at_low + (queries - low) * (at_high - at_low) / (high - low)
    return (compute + 4e-5 * batch * max(0, context - 512)) / 1000


def cpu_seconds(rows, batch, context):
    """A model of 135 M weights on two CPU cores: a product of few query tokens costs little more than of one."""
    queries = rows * batch
    return 0.026 + 0.0025 * min(queries, 4) + 0.0022 * queries + 3e-7 * batch * context


@dataclass
class SimulatedDecoder:
    """A decoder whose steps take the time of a formula."""

    clock: Clock
    seconds: object
    slots: int = 8
    context_len: int = 8192
    captures: bool = False
    draft: DraftConfig = field(default_factory=lambda: DraftConfig(block_len=8))

    @contextmanager
    def rehearsal(self, batch, context):
        K = self.draft.block_len
        yield lambda plan: self.clock.run(self.seconds(plan.query_tokens(K), batch, context))


@dataclass(frozen=True)
class Drafts:
    """How often drafts are accepted: in easy and in hard passages of a text."""

    easy: float
    hard: float
    decay: float = 0.97
    """Factor of the rate with each place in a block."""
    late: float = 0.6
    """Factor of the rate of drafts behind a correction."""
    passage: float = 12.0
    """Mean tokens of a passage."""
    loops: bool = False
    """Whether an easy passage goes on to the end of the text, as where a small model repeats itself."""


class SimulatedText:
    """A sequence whose next drafts are accepted by chance; chance depends on the text alone, not on the plans."""

    def __init__(self, name, drafts, seed, length):
        luck = random.Random(seed)
        self.name, self.length, self.pending, self.late, self.tokens = name, length, 1, 0, 0
        self.drafts, easy = drafts, luck.random() < 0.5 and not drafts.loops
        self.rate, self.luck = [], []
        for _ in range(length + 64):
            turns = luck.random() < 1 / drafts.passage
            easy = (easy or turns) if drafts.loops else easy != turns
            self.rate.append(drafts.easy if easy else drafts.hard)
            self.luck.append(luck.random())

    def accepts(self, ahead):
        """Whether the draft so many places ahead is accepted, given that all drafts before it were."""
        place = self.tokens + ahead
        rate = self.rate[place] * self.drafts.decay ** (ahead + self.late - 1)
        return self.luck[place] < rate * (self.drafts.late if self.late else 1.0)

    def step(self, plan, block_len):
        """Verify and draft as the plan has it."""
        most, n = min(plan.clean_len, self.pending), 1
        while n < most and self.accepts(n):
            n += 1
        sent = min(n, self.length - self.tokens)
        self.tokens += n
        reason = "length" if self.tokens >= self.length else None
        step = DecodeStep(self.name, (1,) * sent, reason, self.pending, n, plan.clean_len, mask_offset=self.late)
        width, groups = plan.masks(block_len), [group for group in plan.groups if group <= n]
        late = n - max(groups) if groups else width
        self.pending, self.late = (width - late, late) if late < width - 1 else (1, 0)
        return step


class FixedCycle:
    """A planner that takes the plans of one candidate in turns."""

    def __init__(self, cycle):
        self.cycle = cycle

    def next_plan(self, pending, context):
        if max(pending.values()) > 1 or not self.cycle[0].groups:
            return self.cycle[-1]
        return replace(self.cycle[0], clean_len=1, groups=(1,))

    def observe(self, steps):
        pass


def served(planner, decoder, drafts, *, batch, tokens, length=200, context=500, seed=0, loop=0.0):
    """Tokens per second of a planner over so many tokens of a full batch.

    length  mean tokens of a text; the next text takes its place
    loop    seconds of the loop between two steps
    """
    K, clock, ordinals = decoder.draft.block_len, decoder.clock, [0] * batch

    def next_text(slot):
        ordinals[slot] += 1
        own = random.Random(f"{seed} {slot} {ordinals[slot]}")
        return SimulatedText(f"{slot} {ordinals[slot]}", drafts, own.random(), own.randint(1, 2 * length))

    texts = [next_text(slot) for slot in range(batch)]
    began, done = clock.now, 0
    while done < tokens:
        plan = planner.next_plan({text.name: text.pending for text in texts}, context)
        clock.run(decoder.seconds(plan.query_tokens(K), batch, context))
        steps = [text.step(plan, K) for text in texts]
        planner.observe(steps)
        clock.run(loop)
        done += sum(len(step.token_ids) for step in steps)
        for slot, step in enumerate(steps):
            if step.finish_reason is not None:
                texts[slot] = next_text(slot)
    return done / (clock.now - began)


def best_fixed(candidates, decoder, drafts, **traffic):
    """Speed of the best candidate that is never changed, and of autoregression, found by trying all."""
    speeds = [served(FixedCycle(candidate.cycle), decoder, drafts, **traffic) for candidate in candidates]
    return max(speeds), speeds[0]
