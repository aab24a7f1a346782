"""Agreement on an accelerator: captured steps and kernels generate what the plain loop generates."""

from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPlanner, prompts, requests
from tiny import wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode
from tidar_core.transformer.shapes import named_shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAMPLED = SamplingConfig(max_tokens=24, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=6)


@pytest.fixture(scope="module")
def model():
    return wide_model(replace(named_shape("tiny"), head_size=16)).to("cuda")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.2, logprobs=2)])
@pytest.mark.parametrize("mode", [*MODES, "any"])
@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_a_gpu_decodes_the_autoregressive_text_in_fp32(model, mode, sampling, kind):
    if kind == "sampled" and sampling is not GREEDY:
        pytest.skip("drawn drafts keep the law, not the text")
    texts = prompts(5, 12, 3, 8, 30)
    decoder = Decoder(model, DraftConfig(block_len=4, kind=kind), slots=3, context_len=64, page_len=4, pages=30)
    planner = RandomPlanner(3, 4) if mode == "any" else FixedMode(mode, 4)
    scheduler = Scheduler(decoder, planner)
    done = complete(scheduler, requests(texts, sampling))
    assert [tuple(c.token_ids) for c in done] == [generate_autoregressive(model, text, sampling) for text in texts]
    assert scheduler.pool.held == 0


def test_a_step_is_captured_once_for_each_shape(model):
    decoder = Decoder(model, DraftConfig(block_len=4), slots=4, context_len=64)
    complete(Scheduler(decoder, FixedMode("single-pass", 4)), requests(prompts(5, 12, 3, 8), GREEDY))
    shapes = decoder._graphs.captured
    complete(Scheduler(decoder, FixedMode("single-pass", 4)), requests(prompts(6, 11, 4, 7, seed=2), GREEDY))
    assert decoder._graphs.captured == shapes <= 3 * 3
