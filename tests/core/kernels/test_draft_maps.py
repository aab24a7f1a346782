"""Maps of adapter and link: the same results in all forms, and other values in the same memory."""

import pytest
import torch

from tidar_core.kernels.compiled import library
from tidar_core.kernels.draft_maps import CompiledLowRank, CompiledMap, PlainLowRank, PlainMap

compiled = pytest.mark.skipif(library() is None, reason="no C compiler works here")
LOW_RANK = [pytest.param(CompiledLowRank, marks=compiled), PlainLowRank]
MAPS = [pytest.param(CompiledMap, marks=compiled), PlainMap]
SIZES = [
    (1, 12, 4, 576, 3072, 32),
    (5, 20, 4, 100, 70, 4),
    (1, 8, 0, 64, 32, 16),
    (3, 41, 1, 1536, 576, 32),
    (1, 5, 4, 64, 96, 16),
    (3, 4, 3, 32, 40, 5),
]
"""Sequences, query tokens, clean ones, inputs, outputs, rank."""


def drawn(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) / shape[-1] ** 0.5 for shape in shapes]


@pytest.mark.parametrize("form", LOW_RANK)
@pytest.mark.parametrize(("B", "R", "clean", "inputs", "outputs", "rank"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_get_the_product_of_both_maps_and_clean_tokens_nothing(form, dtype, B, R, clean, inputs, outputs, rank):
    down, up, x, y = drawn(dtype, (rank, inputs), (outputs, rank), (B, R, inputs), (B, R, outputs))
    expected = y.double()
    expected[:, clean:] += x[:, clean:].double() @ down.double().T @ up.double().T
    found, read = y.clone(), x.clone()
    form(down, up).add_to(found, read, clean)
    assert torch.equal(read, x)
    assert torch.equal(found[:, :clean], y[:, :clean])
    close = 2 ** (-7 if dtype is torch.bfloat16 else -18)
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("form", LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_maps_take_the_place_of_the_first(form, dtype):
    """In the same memory: a captured step keeps its addresses."""
    first, second = drawn(dtype, (4, 40), (70, 4), seed=1), drawn(dtype, (4, 40), (70, 4), seed=2)
    (x, y) = drawn(dtype, (2, 6, 40), (2, 6, 70), seed=3)
    held, expected, found = form(*first), y.clone(), y.clone()
    places = [weight.data_ptr() for weight in held._held]
    held.refresh(*second)
    held.add_to(found, x, 2)
    form(*second).add_to(expected, x, 2)
    assert torch.equal(found, expected)
    assert [weight.data_ptr() for weight in held._held] == places


@pytest.mark.parametrize("form", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_adds_its_product_and_takes_another_weight_in_the_same_memory(form, dtype):
    first, second, x, y = drawn(dtype, (70, 40), (70, 40), (2, 3, 40), (2, 3, 70))
    held = form(first)
    place = held._held[0].data_ptr()
    for weight in (first, second):
        held.refresh(weight)
        found, expected = y.clone(), y.double() + x.double() @ weight.double().T
        held.add_to(found, x)
        close = 2 ** (-7 if dtype is torch.bfloat16 else -18)
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    assert held._held[0].data_ptr() == place


@pytest.mark.parametrize("form", MAPS)
@pytest.mark.parametrize(("B", "R"), [(1, 4), (3, 4), (3, 1)])
def test_a_map_adds_to_one_mask_of_each_sequence_and_to_nothing_else(form, B, R):
    weight, x, y = drawn(torch.bfloat16, (70, 40), (B, 1, 40), (B, R, 70))
    found, alone = y.clone(), y[:, R - 1 :].clone()
    form(weight).add_to(found[:, R - 1 :], x)
    form(weight).add_to(alone, x)
    assert torch.equal(found[:, : R - 1], y[:, : R - 1])
    assert torch.equal(found[:, R - 1 :], alone)
    assert not torch.equal(alone, y[:, R - 1 :])
