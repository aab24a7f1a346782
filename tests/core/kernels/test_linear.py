"""The forms in which a CPU holds the weights of a decoder: same products, one copy, same texts."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from decoding import GREEDY, expected_texts, prompts, requests
from tiny import adapted_model, wide_model

from tidar_core.config import DraftConfig
from tidar_core.decoding import decode_forward
from tidar_core.decoding.autoregressive import score
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import ConfigError
from tidar_core.kernels import PLAIN
from tidar_core.kernels import linear as linears
from tidar_core.kernels.compiled import library
from tidar_core.kernels.linear import (
    Bf16Linear,
    Fp32Linear,
    PackedLinear,
    held_bytes,
    prepare_for_decoding,
    weight_bytes,
)
from tidar_core.kernels.quantised_linear import WEIGHTS, Int4Linear, Int8Linear
from tidar_core.planning.decode_step_benchmark import random_model
from tidar_core.transformer.shapes import named_shape

SMALL = 2 * torch.finfo(torch.float32).eps * 300
"""Sums of up to 300 products of values about 1, in another order."""

compiled = pytest.mark.skipif(library() is None, reason="no C compiler works here")
packing = pytest.mark.skipif(not linears._packs(2**20, torch.bfloat16, "cpu"), reason="oneDNN does not pack bf16 here")


UNTIED = replace(named_shape("tiny"), tied_head=False)
"""A tied head repeats the last token, and so hides differences."""


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


@pytest.fixture
def without_compiler(monkeypatch):
    """A machine on which no C kernels can be had."""
    monkeypatch.setattr(linears, "library", lambda: None)
    monkeypatch.setattr(decode_forward, "kernels_for", lambda *of: PLAIN)


FORMS = {Fp32Linear: torch.float32, Bf16Linear: torch.bfloat16}


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("out", "width"), [(96, 320), (41, 300), (7, 5)])
def test_a_compiled_product_is_the_plain_product_up_to_the_order_of_sums(form, biased, out, width):
    dtype = FORMS[form]
    weight, bias = weights(out, width, dtype)
    bias, x = bias if biased else None, torch.randn(3, 7, width).to(dtype)
    found = form(weight, bias)(x)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype
    # In bf16 the product is rounded once, to 8 bits.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8 if form is Bf16Linear else 0, atol=SMALL)


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


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=compiled), pytest.param(False, marks=packing)])
def test_a_prepared_model_holds_each_weight_once_and_a_tied_table_twice(compiles, request):
    if not compiles:
        request.getfixturevalue("without_compiler")
    model = adapted_model(replace(named_shape("tiny"), tied_head=True, hidden_size=64, head_size=16)).bfloat16()
    before = weight_bytes(model)
    table = model.embedding.weight
    maps = [weakref.ref(layer.mlp.down.weight) for layer in model.layers]
    prepare_for_decoding(model)
    gc.collect()
    assert all(held() is None for held in maps), "the plain weights are still there"
    assert isinstance(model.head, Bf16Linear if compiles else PackedLinear)
    assert weight_bytes(model) == before + table.numel() * table.element_size()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_a_compiler_small_fp32_weights_stay_plain_and_on_a_gpu_all(without_compiler):
    model = wide_model(named_shape("tiny"))
    prepare_for_decoding(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert not linears._packs(2**30, torch.bfloat16, "cuda")
    assert not linears._packs(2**30, torch.float16, "cpu")


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=compiled), False])
def test_a_checkpoint_has_the_same_bits_with_and_without_drafts(compiles, monkeypatch, request):
    if not compiles:
        request.getfixturevalue("without_compiler")
    monkeypatch.setitem(linears.PACKED_ENTRIES, torch.float32, 0)
    adapted, logprobs = adapted_model(UNTIED), []
    plain = wide_model(replace(UNTIED, mask_id=None))
    plain.load_state_dict(adapted.state_dict(), strict=False)
    for model in (plain, adapted):
        prepare_for_decoding(model)
        packs = linears._packs(1, torch.float32, "cpu")
        assert isinstance(model.layers[0].mlp.down, Fp32Linear) == compiles
        assert isinstance(model.layers[0].mlp.down, PackedLinear) == (packs and not compiles)
        logprobs.append(score(model, prompts(40)[0]).logprob_L)
    assert torch.equal(*logprobs)


@packing
@pytest.mark.parametrize("mode", ["autoregressive", "single-pass", "two-pass"])
def test_texts_of_a_packed_model_are_those_of_the_plain_model(mode, monkeypatch, without_compiler):
    monkeypatch.setattr(linears, "PACKED_ENTRIES", {torch.float32: 0})
    for make in (lambda: wide_model(UNTIED), lambda: adapted_model(UNTIED)):
        model, expected = make(), expected_texts(make(), prompts(3, 17, 9), GREEDY)
        prepare_for_decoding(model)
        assert isinstance(model.layers[0].mlp.down, PackedLinear)
        assert texts_of(model, mode) == expected


@compiled
@pytest.mark.parametrize("form", ["fp32", "bf16", *WEIGHTS])
def test_a_token_has_the_same_bits_in_every_mode_and_batch(form):
    """Log-probabilities of AR mode, one token a forward and one text a batch, equal those of drafted tokens.

    Heads of 32 go through matrix instructions in bf16, where the processor has some.
    """
    config = replace(UNTIED, hidden_size=64, head_size=32, context_len=512)
    model = adapted_model(config)
    model = model.bfloat16() if form == "bf16" else model
    prepare_for_decoding(model, form if form in WEIGHTS else None)
    prompts_of = prompts(3, 17, 9, 40, 200)
    alone = [scored_texts(model, "autoregressive", [prompt])[0] for prompt in prompts_of]
    for mode in ("autoregressive", "single-pass", "two-pass"):
        assert scored_texts(model, mode, prompts_of) == alone


def scored_texts(model, mode, prompts_of):
    """Tokens and the log-probability of each, of several texts at once."""
    decoder = Decoder(model, DraftConfig(block_len=4), slots=len(prompts_of))
    scheduler = Scheduler(decoder, FixedMode(mode, 4))
    for request in requests(prompts_of, replace(GREEDY, logprobs=1)):
        scheduler.submit(request)
    texts = {}
    while scheduler.busy:
        for step in scheduler.advance():
            texts.setdefault(step.request_id, []).extend(zip(step.token_ids, step.logprobs))
    return [texts[name] for name in sorted(texts)]


def rounded_int8(weight):
    """The values that weights of 8 bits represent, a channel at a time."""
    steps = [channel.abs().max() / 127 for channel in weight.double()]
    return torch.stack([(channel / step).round() * step for channel, step in zip(weight.double(), steps)])


def rounded_int4(weight, group=32):
    """The values that weights of 4 bits represent, a group at a time; least values and steps are those of bf16."""
    values = weight.double().clone()
    for channel in values:
        for first in range(0, len(channel), group):
            part = channel[first : first + group]
            least = part.min().bfloat16().double()
            step = ((part.max() - least) / 15).bfloat16().double()
            part.copy_(least + ((part - least) / step).round().clamp(0, 15) * step)
    return values


def rounded_groups(x, group):
    """The values that activations of 8 bits represent, a group of a token at a time."""
    values = x.double().clone()
    for token in values:
        for first in range(0, len(token), group):
            part = token[first : first + group]
            step = part.abs().max() / 127
            part.copy_(torch.tensor([round(v) for v in (part / step).tolist()]) * step)
    return values


@compiled
def test_an_int8_product_is_that_of_the_rounded_weights_and_activations():
    weight, bias = weights(24, 150, torch.float32)  # the last run of inputs is a part of one
    x = torch.randn(3, 150) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(64)[:150]
    expected = rounded_groups(x, 64) @ rounded_int8(weight).T + bias.double()
    torch.testing.assert_close(Int8Linear(weight, bias)(x).double(), expected, rtol=0, atol=1e-3)


@compiled
def test_an_int4_product_is_that_of_the_rounded_weights_and_activations():
    weight, bias = weights(41, 96, torch.float32)
    x = torch.randn(3, 96)
    expected = rounded_groups(x, 32) @ rounded_int4(weight).T + bias.double()
    torch.testing.assert_close(Int4Linear(weight, bias)(x).double(), expected, rtol=0, atol=SMALL)


@compiled
def test_blocks_of_gguf_keep_their_values_as_int4():
    levels = torch.randint(0, 16, (32, 2, 32)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    weight = (levels * 0.125 - 1).flatten(1)
    torch.testing.assert_close(Int4Linear(weight, None)(torch.eye(64)).T, weight, rtol=0, atol=1e-6)


@compiled
@pytest.mark.parametrize(
    ("form", "dtype"),
    [*FORMS.items(), *((form, dtype) for form in (Int8Linear, Int4Linear) for dtype in FORMS.values())],
)
def test_results_of_a_token_do_not_depend_on_how_many_tokens_a_product_has(form, dtype):
    weight, bias = weights(96, 160, dtype)
    held, x = form(weight, bias), torch.randn(1, 40, 160).to(dtype)
    together = held(x)
    for tokens in (*range(1, 17), 33):
        assert torch.equal(held(x[:, :tokens]), together[:, :tokens]), tokens
    assert torch.equal(held(x.view(8, 5, 160)), together.view(8, 5, 96))
    assert held(torch.zeros(1, 1, 160, dtype=dtype)).isfinite().all()
    assert held(x[:, :0]).shape == (1, 0, 96)


@compiled
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [*FORMS.items(), *((form, dtype) for form in (Int8Linear, Int4Linear) for dtype in FORMS.values())],
)
def test_a_token_that_is_not_finite_is_not_hidden_and_changes_no_other(form, dtype, wrong):
    held, x = form(*weights(64, 96, dtype)), torch.randn(7, 96).to(dtype)
    right = held(x)
    x[3, 40] = wrong
    found = held(x)
    assert not found[3].isfinite().any()
    assert torch.equal(found[[0, 1, 2, 4, 5, 6]], right[[0, 1, 2, 4, 5, 6]])


@compiled
@pytest.mark.parametrize("bits", WEIGHTS)
def test_all_modes_of_a_quantised_model_have_the_same_greedy_texts(bits):
    for make in (lambda: wide_model(UNTIED), lambda: adapted_model(UNTIED)):
        model, plain = make(), make()
        prepare_for_decoding(model, bits)
        expected = expected_texts(model, prompts(3, 17, 9), GREEDY)
        assert expected != expected_texts(plain, prompts(3, 17, 9), GREEDY), "the weights were not rounded"
        for mode in ("autoregressive", "single-pass", "two-pass"):
            assert texts_of(model, mode) == expected


@compiled
@pytest.mark.parametrize("bits", WEIGHTS)
def test_the_bytes_of_quantised_weights_are_known_beforehand(bits):
    for tied in (True, False):
        model = wide_model(replace(named_shape("tiny"), tied_head=tied))
        beforehand = held_bytes(model, "cpu", bits)
        prepare_for_decoding(model, bits)
        assert weight_bytes(model) == beforehand


@compiled
def test_widths_that_no_group_divides_are_refused_in_one_line():
    model = wide_model(replace(named_shape("tiny"), intermediate_size=72))
    with pytest.raises(ConfigError, match=r"from 72 to .*; int4 needs a multiple of 32 features in; give int8"):
        prepare_for_decoding(model, "int4")
    assert model.weights is None


def test_quantised_weights_of_a_gpu_are_refused():
    model = random_model(named_shape("tiny"), torch.float32, torch.device("meta"))
    with pytest.raises(ConfigError, match="int8 needs a CPU; leave weights out"):
        prepare_for_decoding(model, "int8")


def test_quantised_weights_without_a_compiler_are_refused(without_compiler):
    model = wide_model(UNTIED)
    with pytest.raises(ConfigError, match="int8 needs Linux and a C compiler, and none works here; install gcc"):
        prepare_for_decoding(model, "int8")
    assert model.weights is None


@compiled
def test_drafts_of_a_quantised_model_are_exchanged_and_change_no_text():
    model, other = adapted_model(UNTIED), adapted_model(UNTIED, seed=7)
    prepare_for_decoding(model, "int8")
    expected = expected_texts(model, prompts(3, 17, 9), GREEDY)
    decoder = Decoder(model, DraftConfig(block_len=4), slots=3)
    decoder.load_drafts({name: w for name, w in other.named_parameters() if name.startswith("adapter.")})
    assert torch.equal(model.adapter.mask, other.adapter.mask)
    assert texts_of(model, "single-pass") == expected
