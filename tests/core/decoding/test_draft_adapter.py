"""Drafts of an adapter change no text, and decoding reads masks as training laid them out."""

from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPlanner, expected_texts, prefilled, prompts, requests
from replay import StandInRecorder
from tiny import adapted_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.completion import complete
from tidar_core.decoding.cuda_graphs import StepGraphs
from tidar_core.decoding.decode_forward import DecodeForward
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.layout import decode_layout

K = 4
SAMPLED = SamplingConfig(max_tokens=24, temperature=1.0, top_k=50, seed=6)


@pytest.fixture(scope="module")
def adapted():
    return adapted_model(link_rank=4)


@torch.no_grad()
def test_a_forward_over_the_cache_equals_a_fresh_forward_of_text_and_one_block(adapted):
    prompt, drafts = prompts(9)[0], prompts(K, seed=1)[0]
    cache, table = KVCache(adapted.config, pages=8, page_len=4), torch.tensor([[7, 2, 5, 1, 8]])
    read = DecodeForward(adapted, cache, positions=40, block_len=K)
    for tokens, start, groups in ((prompt, 0, ()), (drafts, 9, (1, 2, 3, 4))):
        pattern = QueryPattern.of(len(tokens), groups, K, table.device)
        hidden = read(table, torch.tensor([start]), torch.tensor([tokens]), pattern, -(-start // 4))[0]
    for g in range(1, K + 1):
        text = (*prompt, *drafts[:g])
        fresh = decode_layout(torch.tensor([0]), len(text), (len(text),), K)
        rows = torch.tensor([[*text, *[0] * K]])
        expected = adapted.adapted(rows, fresh.position, DenseAttention(fresh), torch.arange(K)[None])[0]
        # fp32, keys summed in another order
        torch.testing.assert_close(hidden[g * K :][:K], expected[len(text) :], rtol=0, atol=2e-5)
        torch.testing.assert_close(hidden[g - 1], expected[len(text) - 1], rtol=0, atol=2e-5)


PLANNERS = {mode: FixedMode(mode, K) for mode in MODES} | {"any plan": RandomPlanner(1, K)}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_texts_are_the_autoregressive_ones_in_every_mode_beside_requests_without_drafts(adapted, planner, sampling):
    texts = prompts(9, 14, 5, 11, 7)
    decoder = Decoder(adapted, DraftConfig(block_len=K), slots=3, context_len=64, page_len=4)
    mixed = [replace(request, speculative=i != 2) for i, request in enumerate(requests(texts, sampling))]
    done = complete(Scheduler(decoder, planner), mixed)
    assert [tuple(completion.token_ids) for completion in done] == expected_texts(adapted, texts, sampling)
    assert done[2].forwards == 24


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_captured_steps_give_the_results_of_plain_steps(adapted, kind):
    done = []
    for captured in (True, False):
        decoder = Decoder(adapted, DraftConfig(block_len=K, kind=kind), slots=3, context_len=64, page_len=4)
        if captured:
            decoder._graphs = StepGraphs(decoder._runner, StandInRecorder())
        done.append(complete(Scheduler(decoder), requests(prompts(5, 12, 3, 8), SAMPLED)))
    assert [c.token_ids for c in done[0]] == [c.token_ids for c in done[1]]


def test_a_text_may_hold_any_id_and_drafts_depend_on_it_as_on_a_text(adapted):
    every_id = tuple(range(500, 512))
    greedy = replace(GREEDY, max_tokens=8)
    decoder = Decoder(adapted, DraftConfig(block_len=K), slots=1, context_len=64)
    scheduler = Scheduler(decoder)
    prefilled(scheduler, requests([every_id], greedy)[0])
    drafts = decoder._state.draft[0].tolist()
    with torch.no_grad():
        layout = decode_layout(torch.tensor([0]), 12, (12,), K)
        rows = torch.tensor([[*every_id, *[0] * K]])
        hidden = adapted.adapted(rows, layout.position, DenseAttention(layout), torch.arange(K)[None])
        masks = adapted.head(hidden)[0, 12:]
        chain = [generate_autoregressive(adapted, every_id, greedy)[0]]
        for j in range(1, K):
            link = adapted.link.after @ adapted.link.before[chain[-1]]
            chain.append(int((masks[j] + link).argmax()))
    assert drafts == chain
