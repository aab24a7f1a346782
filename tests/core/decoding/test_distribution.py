"""Texts of drawn drafts follow the autoregressive distribution: a decoder against enumeration of all texts."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.sampling import SamplingTensors, target_probs
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout
from tidar_core.transformer.shapes import named_shape

pytestmark = pytest.mark.slow

VOCABULARY, TOKENS, TEXTS = 4, 3, 1500
PROMPT = (1, 2, 0)


@pytest.fixture(scope="module", params=[0, 2], ids=["", "linked"])
def small(request):
    shape = replace(named_shape("tiny"), vocab_size=VOCABULARY + 1, mask_id=VOCABULARY, link_rank=request.param)
    model = wide_model(shape, seed=2)
    with torch.no_grad():
        if model.link is not None:
            model.link.after.copy_(0.2 * torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
        model.head.weight.mul_(0.3)  # logits about 1 apart: every text has a chance
    return model


def enumerated_distribution(model, sampling):
    """Probability of every text of TOKENS tokens, one causal forward for each."""
    texts = list(itertools.product(range(VOCABULARY), repeat=TOKENS))
    ids = torch.tensor([[*PROMPT, *text] for text in texts])
    layout = causal_layout(torch.zeros_like(ids))
    with torch.no_grad():
        logits = model.head(model(ids, layout.position, DenseAttention(layout)))[:, len(PROMPT) - 1 : -1]
    probs = target_probs(logits, SamplingTensors.of([sampling] * len(texts)))
    chosen = probs.gather(-1, ids[:, len(PROMPT) :, None])[..., 0]
    return dict(zip(texts, chosen.double().prod(-1).tolist()))


@pytest.mark.parametrize(
    ("kind", "planner"),
    [
        ("sampled", FixedMode("single-pass", 3)),
        ("sampled", FixedMode("single-pass", 3, (1,))),
        ("sampled", FixedMode("two-pass", 3)),
        ("argmax", FixedMode("single-pass", 3)),
    ],
)
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.2, top_p=0.9)])
def test_texts_follow_the_autoregressive_distribution(small, kind, planner, sampling):
    sampling = replace(sampling, max_tokens=TOKENS)
    expected = enumerated_distribution(small, sampling)
    decoder = Decoder(small, DraftConfig(block_len=3, kind=kind), slots=500, context_len=16)
    requests = [
        Request(request_id=str(seed), prompt=PROMPT, sampling=replace(sampling, seed=seed)) for seed in range(TEXTS)
    ]
    done = complete(Scheduler(decoder, planner, max_waiting=TEXTS), requests)
    counts = dict.fromkeys(expected, 0)
    for completion in done:
        counts[tuple(completion.token_ids)] += 1
    if kind == "sampled":
        assert sum(c.accepted[2] + c.accepted[3] for c in done) > TEXTS / 20  # drafts were kept, and some were not
        assert sum(c.accepted[1] for c in done) > TEXTS / 20
    assert all(counts[text] == 0 for text, p in expected.items() if p == 0)
    cells = [(counts[text], TEXTS * p) for text, p in expected.items() if p > 0]
    rare = [cell for cell in cells if cell[1] < 5]
    pooled = [cell for cell in cells if cell[1] >= 5] + ([tuple(map(sum, zip(*rare)))] if rare else [])
    statistic = sum((found - mean) ** 2 / mean for found, mean in pooled)
    degrees = len(pooled) - 1
    assert degrees >= 10
    # chi-square: mean = degrees, variance = 2 x degrees; five standard deviations above. Seeds are fixed: no luck.
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
