"""The forms in which a CPU holds the weights of a decoder: same products, one copy, same texts."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from decoding import GREEDY, expected_texts, prompts, requests
from tiny import adapted_model, wide_model

from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.kernels import linear as linears
from tidar_core.kernels.linear import PackedLinear, packs, prepare_for_decoding, weight_bytes
from tidar_core.transformer.shapes import named_shape

SMALL = 2 * torch.finfo(torch.float32).eps * 300
"""Sums of up to 300 products of values about 1, in another order."""

packing = pytest.mark.skipif(not packs(2**20, torch.bfloat16, "cpu"), reason="oneDNN does not pack bf16 here")


def weights(out, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(size, generator=generator).to(dtype) for size in ((out, width), (out,)))
    return tuple(draw)


def texts_of(model, mode, block_len=4):
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=3)
    scheduler = Scheduler(decoder, FixedMode(mode, block_len))
    for request in requests(prompts(3, 17, 9), GREEDY):
        scheduler.submit(request)
    texts = {}
    while scheduler.busy:
        for step in scheduler.advance():
            texts.setdefault(step.request_id, []).extend(step.token_ids)
    return [tuple(texts[name]) for name in sorted(texts)]


@packing
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 100])
def test_a_packed_product_is_the_plain_product_bit_for_bit_in_bf16(tokens, biased):
    weight, bias = weights(96, 300, torch.bfloat16)
    bias, x = bias if biased else None, torch.randn(2, tokens, 300).bfloat16()
    assert torch.equal(PackedLinear(weight, bias)(x), F.linear(x, weight, bias))


@packing
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_a_packed_product_is_the_plain_product_up_to_the_order_of_sums_in_fp32(tokens):
    weight, bias = weights(96, 300, torch.float32)
    x = torch.randn(2, tokens, 300)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), F.linear(x, weight, bias), rtol=0, atol=SMALL)
    assert torch.equal(PackedLinear(weight, bias)(x[:, :3]), PackedLinear(weight, bias)(x[:, :3].contiguous()))


@packing
def test_a_prepared_model_holds_each_weight_once_and_a_tied_table_twice():
    model = adapted_model(replace(named_shape("tiny"), tied_head=True)).bfloat16()
    before = weight_bytes(model)
    table = model.embedding.weight
    maps = [weakref.ref(layer.mlp.down.weight) for layer in model.layers]
    prepare_for_decoding(model)
    gc.collect()
    assert all(held() is None for held in maps), "the plain weights are still there"
    assert isinstance(model.head, PackedLinear)
    assert weight_bytes(model) == before + table.numel() * table.element_size()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_small_fp32_weights_and_all_weights_of_a_gpu_stay_plain():
    model = wide_model(named_shape("tiny"))
    prepare_for_decoding(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert not packs(2**30, torch.bfloat16, "cuda")
    assert not packs(2**30, torch.float16, "cpu")


@packing
@pytest.mark.parametrize("mode", ["autoregressive", "single-pass", "two-pass"])
def test_texts_of_a_packed_model_are_those_of_the_plain_model(mode, monkeypatch):
    monkeypatch.setattr(linears, "PACKED_ENTRIES", {torch.float32: 0})
    for make in (lambda: wide_model(named_shape("tiny")), adapted_model):
        model, expected = make(), expected_texts(make(), prompts(3, 17, 9), GREEDY)
        prepare_for_decoding(model)
        assert isinstance(model.layers[0].mlp.down, PackedLinear)
        assert texts_of(model, mode) == expected
