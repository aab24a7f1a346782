"""Prompts, requests and the texts that autoregressive decoding generates for them."""

import random

import torch

from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.request import Request
from tidar_core.decoding.step_plan import StepPlan

GREEDY = SamplingConfig(max_tokens=24)


class RandomPlanner:
    """A planner that draws a random plan at each step, and at random drafts at prefill."""

    def __init__(self, seed, block_len):
        self.random, self.block_len = random.Random(seed), block_len

    @property
    def drafts_first_blocks(self):
        return self.random.random() < 0.5

    def begin_prefill(self):
        pass

    def end_prefill(self):
        pass

    def next_plan(self, pending, context):
        clean_len = self.random.randint(1, self.block_len)
        groups = [g for g in range(1, clean_len + 1) if self.random.random() < 0.4]
        return StepPlan(clean_len, tuple(groups), self.random.randint(1, self.block_len) if groups else 0)

    def observe(self, steps, *, beside=False):
        assert steps


class RandomPace:
    """A pace that draws the length of each chunk, and how many layers it passes in each gap, at random."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def tokens(self, running):
        return self.random.randint(0, 8) if running else 512

    def layers(self, tokens, left):
        return self.random.randint(0, left)

    def idle(self):
        pass

    def step_ended(self, read, share):
        pass


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 500, (n,), generator=generator).tolist()) for n in lengths]


def requests(texts, sampling):
    return [Request(request_id=str(i), prompt=text, sampling=sampling) for i, text in enumerate(texts)]


def expected_texts(model, texts, sampling):
    """The autoregressive texts: one token per forward, one prompt at a time."""
    return [generate_autoregressive(model, text, sampling) for text in texts]


def prefilled(scheduler, request, **settings):
    """The step that the prefill of `request` returns."""
    scheduler.submit(request)
    return scheduler.prefill(10**6, **settings)[0]
