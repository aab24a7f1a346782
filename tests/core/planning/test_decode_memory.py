"""The bound of a decoder's memory: what it counts, that no forward takes more, and that captures share theirs."""

import copy
from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, prompts, requests

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.decoder_size import DecoderSize
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.kernels.linear import prepare_for_decoding, weight_bytes
from tidar_core.planning.decode_memory import LiveBytes, memory_bound
from tidar_core.planning.decode_step_benchmark import random_model
from tidar_core.transformer.shapes import named_shape

K = 4
WARM = SamplingConfig(max_tokens=30, temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, seed=3)


def bound(
    config, *, rows, kind="argmax", block_len=K, context_len=None, mode="auto", dtype=torch.float32, device="cpu"
):
    draft = DraftConfig(block_len=block_len, kind=kind)
    size = DecoderSize.of(config, draft, slots=rows, context_len=None, pages=None, page_len=16)
    return memory_bound(config, draft, size, dtype=dtype, mode=mode, device=device)


def test_live_bytes_are_those_of_the_tensors_that_are_there_at_once():
    with LiveBytes(torch.device("cpu"), sort_bytes=10) as live:
        kept = torch.zeros(100)
        assert live.bytes == 400
        assert live.above([lambda: torch.zeros(50) + torch.zeros(50)]) == 3 * 200
        assert live.above([lambda: torch.zeros(1000).view(10, 100)[0].sum()]) == 4000 + 4
        assert live.above([lambda: kept.sort()]) == 100 * (4 + 8) + 100 * 10
        assert live.bytes == 400


def test_weights_and_cache_are_those_of_the_decoder(model):
    prepared = copy.deepcopy(model)
    prepare_for_decoding(prepared)
    decoder, found = Decoder(prepared, DraftConfig(block_len=K), slots=3), bound(model.config, rows=3)
    assert found.weights == weight_bytes(prepared)
    assert found.cache == decoder.cache.bytes
    assert found.total >= found.weights + found.cache + found.tables + found.forwards
    assert found.captured_steps == 0, "nothing is captured on a CPU"


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_no_prefill_and_no_step_takes_more_than_the_bound(model, kind):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=K, kind=kind), slots=3))
    found = bound(model.config, rows=3, kind=kind)
    samplings = [replace(GREEDY, max_tokens=30), WARM, replace(WARM, beta=0.5), replace(WARM, repetition_penalty=1.2)]
    for sampling in samplings:
        with LiveBytes(torch.device("cpu")) as live:
            for request in requests(prompts(90, 60, 80), replace(sampling, logprobs=3, prompt_logprobs=True)):
                scheduler.submit(request)
            taken = live.above([lambda: scheduler.prefill(10**6)])
            for plan in (StepPlan(1), StepPlan(K), StepPlan(K, (1,)), StepPlan(K, (1, 2, 3, 4))):
                taken = max(taken, live.above([lambda plan=plan: scheduler.decode_step(plan)]))
        for request_id in (*scheduler.running, *scheduler.arriving):
            scheduler.abort(request_id)
        assert 0 < taken <= found.forwards + found.sampling


def test_a_qwen_with_64_slots_captures_all_shapes_of_auto_within_a_few_gibibytes():
    """The logits of one block of 64 slots are 0.3 GiB; they must not be kept once for each shape."""
    config = replace(named_shape("qwen2.5-1.5b"), context_len=2048)
    found = bound(config, rows=64, block_len=16, dtype=torch.bfloat16, device="cuda")
    logits = 64 * 16 * config.vocab_size * 2
    assert found.captured_steps < 40 * logits
    assert found.captured_steps > found.forwards > logits
    assert found.sampling > 4 * logits, "sorting all rows takes more than their logits"


@pytest.mark.parametrize("mode", ["auto", "single-pass", "two-pass", "autoregressive"])
@pytest.mark.parametrize("block_len", [1, 2, 8])
def test_every_mode_and_block_length_has_a_bound(model, mode, block_len):
    found = bound(model.config, rows=1, block_len=block_len, mode=mode, device="cuda")
    assert min(found.weights, found.cache, found.captured_steps, found.forwards) > 0


def test_a_packed_head_counts_beside_the_table_that_it_is_tied_to():
    config = replace(named_shape("tiny"), tied_head=True)
    model = random_model(config, torch.bfloat16, torch.device("cpu"))
    prepare_for_decoding(model)
    assert bound(config, rows=3, dtype=torch.bfloat16).weights == weight_bytes(model)
