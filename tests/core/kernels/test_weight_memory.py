"""Weights of a decoder lie together in large pages, in the order of use, and are freed with the model."""

import mmap

import psutil
import pytest
import torch

from tidar_core.kernels.compiled import library
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.kernels.weight_memory import LINE, PAGE, WeightMemory
from tidar_core.planning.decode_step_benchmark import random_model
from tidar_core.transformer.shapes import named_shape

large_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
MIB = 2**20


def tensors(*sizes):
    return [torch.randint(-128, 127, (size,), dtype=torch.int8) for size in sizes]


@large_pages
def test_tensors_keep_their_values_and_lie_one_after_the_other_from_the_beginning_of_a_page():
    given = [*tensors(2 * MIB - 1, 5), torch.randn(3, 7, 11), torch.randn(2, 9).bfloat16()]
    memory = WeightMemory(sum(x.numel() * x.element_size() for x in given), len(given))
    held = [memory.holding(x) for x in given]
    assert all(torch.equal(one, other) for one, other in zip(held, given))
    assert [x.dtype for x in held] == [x.dtype for x in given]
    assert held[0].data_ptr() % PAGE == 0
    after = held[0].data_ptr()
    for x in held:
        assert 0 <= x.data_ptr() - after < LINE
        assert x.data_ptr() % LINE == 0
        after = x.data_ptr() + x.numel() * x.element_size()


@large_pages
def test_the_region_is_freed_with_its_last_tensor():
    memory = WeightMemory(64 * MIB, 2)
    held = [memory.holding(x) for x in tensors(32 * MIB, 32 * MIB)]
    del memory
    before = psutil.Process().memory_info().rss
    del held[0]
    assert psutil.Process().memory_info().rss > before - 16 * MIB
    held.clear()
    assert psutil.Process().memory_info().rss < before - 60 * MIB


def test_without_such_pages_and_below_one_page_tensors_stay_where_they_are(monkeypatch):
    small, large = tensors(2000, 3 * MIB)
    assert WeightMemory(2000, 1).holding(small) is small
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert WeightMemory(3 * MIB, 1).holding(large) is large


@large_pages
def test_a_kernel_that_has_no_such_pages_leaves_tensors_where_they_are(monkeypatch):
    class Region(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Region)
    (large,) = tensors(3 * MIB)
    assert WeightMemory(3 * MIB, 1).holding(large) is large


def test_where_there_is_no_memory_for_a_region_tensors_stay_where_they_are(monkeypatch):
    def full(*of, **how):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    (large,) = tensors(3 * MIB)
    assert WeightMemory(3 * MIB, 1).holding(large) is large


@large_pages
@pytest.mark.skipif(library() is None, reason="no C compiler works here")
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_maps_of_a_prepared_model_lie_in_the_order_of_use(weights):
    model = random_model(named_shape("quickstart-large"), torch.float32, torch.device("cpu"))
    prepare_for_decoding(model, weights)
    maps = [place for layer in model.layers for place in (layer.attention.qkv, layer.attention.output,
                                                          layer.mlp.gate_up, layer.mlp.down)]  # fmt: skip
    held = [tensor for place in (*maps, model.head) for tensor in place._held]
    ends = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in held]
    assert held[0].data_ptr() % PAGE == 0
    assert all(0 <= after.data_ptr() - end < LINE for end, after in zip(ends, held[1:]))
