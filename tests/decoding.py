"""Prompts, requests and what autoregression says to them."""

import torch

from tidar_core.autoregressive import generate_autoregressive
from tidar_core.config import SamplingConfig
from tidar_core.decoder import Request

GREEDY = SamplingConfig(max_tokens=24)


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 500, (n,), generator=generator).tolist()) for n in lengths]


def requests(texts, sampling):
    return [Request(request_id=str(i), prompt=text, sampling=sampling) for i, text in enumerate(texts)]


def expected_texts(model, texts, sampling):
    """One token per forward, one prompt at a time."""
    return [generate_autoregressive(model, text, sampling) for text in texts]
