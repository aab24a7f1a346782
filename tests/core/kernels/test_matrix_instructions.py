"""The kernels for processors with matrix instructions, which plain C computes here (`matrix_instructions.h`)."""

import ctypes
from pathlib import Path

import attending
import pytest
import torch
from attending import Text, by_definition

from tidar_core.kernels import compiled, on_cpu
from tidar_core.kernels.linear import Bf16Linear

INSTRUCTIONS = Path(attending.__file__).with_name("matrix_instructions.h")
ROUNDED = {"rtol": 2**-7, "atol": 2**-7}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = compiled.compiler_here()
    if compiler is None or "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("it takes a C compiler, and a processor that multiplies pairs of bf16")
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    compiled.build(compiler, path, "-include", str(INSTRUCTIONS))
    found = compiled.load(path)
    ctypes.c_int.in_dll(found, "matrices").value = 1  # the processor would refuse
    return found


@pytest.fixture(autouse=True)
def kernels(library, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: library)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (2, 2, 96), (4, 1, 32)])
@pytest.mark.parametrize("length", [5, 130, 300])
def test_attention_is_within_its_rounding_and_has_the_same_bits_in_chunks(heads, kv_heads, size, length):
    text = Text(length, heads=heads, kv_heads=kv_heads, size=size, dtype=torch.bfloat16)
    whole = text.read()
    torch.testing.assert_close(whole.float(), by_definition(text.call(0, length)), **ROUNDED)
    for ends in ((1,), (3, 4), tuple(range(30, length, 30))):
        assert torch.equal(text.read(*ends), whole)


@pytest.mark.parametrize(("out", "width"), [(64, 64), (96, 100), (40, 576)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_the_plain_one_and_a_token_has_the_same_bits_beside_others(out, width, biased):
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=draw).bfloat16() for size in ((out, width), (out,), (37, width)))
    linear = Bf16Linear(weight, bias if biased else None)
    y = linear(x)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if biased else None)
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7 * width**0.5)
    assert torch.equal(torch.cat([linear(token) for token in x.split(1)]), y)


def test_numbers_are_pairs_of_the_instructions(library):
    """Otherwise this module would test the other kernels."""
    assert compiled.words_together() == 16
    assert on_cpu.needed_library() is library
