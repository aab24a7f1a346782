"""The kernels for other processors than this one.

`conftest.py` compiles them.
"""

import pytest
import torch
from attending import Text, by_definition

from tidar_core.kernels import compiled, on_cpu
from tidar_core.kernels.draft_maps import CompiledLowRank
from tidar_core.kernels.linear import Bf16Linear, Fp32Linear

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}


@pytest.fixture(autouse=True)
def kernels(processor, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: processor[1])


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (2, 2, 96), (4, 1, 40)])
@pytest.mark.parametrize("length", [35, 130, 300])
def test_attention_is_within_its_rounding_and_has_the_same_bits_in_chunks(heads, kv_heads, size, length, dtype):
    text = Text(length, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    whole = text.read()
    torch.testing.assert_close(whole.float(), by_definition(text.call(0, length)), **TOLERANCE[dtype])
    for ends in ((1,), (3, 4), tuple(range(30, length, 30))):
        assert torch.equal(text.read(*ends), whole)


@pytest.mark.parametrize(("linear", "dtype"), [(Fp32Linear, torch.float32), (Bf16Linear, torch.bfloat16)])
@pytest.mark.parametrize(("out", "width"), [(64, 64), (96, 100), (40, 576)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_the_plain_one_and_a_token_has_the_same_bits_beside_others(linear, dtype, out, width, biased):
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=draw).to(dtype) for size in ((out, width), (out,), (37, width)))
    held = linear(weight, bias if biased else None)
    y = held(x)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if biased else None)
    tolerance = TOLERANCE[dtype]["atol"]
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * width**0.5)
    assert torch.equal(torch.cat([held(token) for token in x.split(1)]), y)


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(64, 96, 16), (100, 70, 5)])
@pytest.mark.parametrize("clean", [0, 3, 6, 7])
def test_an_adapter_adds_to_masks_alone(dtype, inputs, outputs, rank, clean):
    draw = torch.Generator().manual_seed(0)
    shapes = (rank, inputs), (outputs, rank), (3, 7, inputs), (3, 7, outputs)
    down, up, x, y = (torch.randn(shape, generator=draw).to(dtype) / shape[-1] ** 0.5 for shape in shapes)
    found, expected = y.clone(), y.float()
    CompiledLowRank(down, up).add_to(found, x, clean)
    expected[:, clean:] += x[:, clean:].float() @ down.float().T @ up.float().T
    torch.testing.assert_close(found.float(), expected, **TOLERANCE[dtype])


def test_the_kernels_are_those_of_the_processor(processor):
    """Otherwise this module would test this processor's own."""
    name, library = processor
    assert on_cpu.needed_library() is library
    assert compiled.words_together() == (16 if "matrix" in name else 1)
