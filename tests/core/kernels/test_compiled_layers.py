"""All layers in one call of C have the bits of as many calls from Python, hidden states and cache."""

from dataclasses import replace

import pytest
import torch
from decoding import prompts
from tiny import adapted_model, wide_model

from tidar_core.decoding.decode_forward import DecodeForward, QueryTokens
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.kernels import c_kernels, compiled
from tidar_core.kernels.compiled import library
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.kernels.quantised_linear import WEIGHTS
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.shapes import named_shape

K = 4
WIDE = replace(named_shape("tiny"), tied_head=False, hidden_size=64, head_size=32)
BIASED = replace(WIDE, qk_norm=False, qkv_bias=True, output_bias=True, mlp_bias=True)
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler works here")


def query_tokens(page_table, texts, groups, prefix):
    rows = torch.tensor(texts)
    pattern = QueryPattern.of(rows.shape[1], groups, K, rows.device)
    return QueryTokens(torch.tensor(page_table), torch.full((len(texts),), prefix), rows, pattern, -(-prefix // 4))


PROMPTS = query_tokens([[1, 2], [3, 4]], prompts(5, 5), (), 0), query_tokens([[5, 6]], prompts(7, seed=1), (7,), 0)
STEP = query_tokens([[1, 2], [3, 4]], prompts(2, 2, seed=2), (1, 2), 5)


def read(model, kernels, *forwards):
    """Hidden states of all parts of all forwards, and the cache afterwards."""
    cache = KVCache(model.config, pages=8, page_len=4, dtype=model.embedding.weight.dtype)
    forward = DecodeForward(model, cache, positions=40, block_len=K, kernels=kernels)
    with torch.no_grad():
        return [hidden for parts in forwards for hidden in forward(*parts)] + [cache.pages[:, 1:]]


def prepared(model, form):
    model = model.bfloat16() if form == "bf16" else model
    prepare_for_decoding(model, form if form in WEIGHTS else None)
    return model


def read_in_both_forms(model):
    """Hidden states and cache by one call of all layers, and by many calls."""
    cache = KVCache(model.config, pages=2, page_len=4)
    assert DecodeForward(model, cache, positions=4, block_len=K).one_call is not None
    forms = (read(model, kernels, PROMPTS, [STEP]) for kernels in (c_kernels(), replace(c_kernels(), layers=None)))
    return list(zip(*forms, strict=True))


@pytest.mark.parametrize("form", ["fp32", "bf16", *WEIGHTS])
@pytest.mark.parametrize("config", [WIDE, BIASED], ids=["norms of heads", "biases"])
@pytest.mark.parametrize("adapted", [True, False])
def test_one_call_has_the_bits_of_many(form, config, adapted):
    found = read_in_both_forms(prepared(adapted_model(config) if adapted else wide_model(config), form))
    assert len(found) == 4
    for one, many in found:
        assert torch.equal(one, many)
        assert one.abs().max() > 0


@pytest.mark.parametrize("form", ["fp32", "bf16", *WEIGHTS])
def test_one_call_has_the_bits_of_many_on_other_processors(monkeypatch, processor, form):
    monkeypatch.setattr(compiled, "library", lambda: processor[1])
    for one, many in read_in_both_forms(prepared(adapted_model(WIDE), form)):
        assert torch.equal(one, many)
        assert one.abs().max() > 0


@pytest.mark.parametrize("form", ["fp32", "bf16", *WEIGHTS])
def test_the_number_of_threads_changes_no_bit(form):
    """Sixteen masks in one step: threads share out the tiles of an adapter's first map, then all panels."""
    model = prepared(adapted_model(replace(WIDE, hidden_size=256, intermediate_size=1024), rank=32), form)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(read(model, c_kernels(), PROMPTS, [STEP]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(*both) for both in zip(found[0], other, strict=True))
