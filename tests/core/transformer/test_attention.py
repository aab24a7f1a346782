"""Attention in chunks equals the dense square, forward and backward."""

from functools import partial

import pytest
import torch
from oracles import documents_row

from tidar_core.kernels import compiled
from tidar_core.kernels.mask_attention import MaskRuns
from tidar_core.transformer.attention import DenseAttention, PiecewiseAttention
from tidar_core.transformer.layout import LENGTH_STEP, PADDING, causal_layout, training_layout
from tidar_core.transformer.visibility import dense_visibility

DOCUMENTS = torch.cat([documents_row(20, 13, 7), documents_row(40), documents_row(3, 30, padding=7)])
LAYOUTS = {"next-token": causal_layout(DOCUMENTS), "mixed": training_layout(DOCUMENTS, torch.tensor([[2], [8], [5]]))}
LAYOUTS["phases"] = training_layout(DOCUMENTS, 8, torch.tensor([[7], [0], [3]]))
LAYOUTS["causal masks"] = training_layout(DOCUMENTS, 8, torch.tensor([[7], [0], [3]]), causal_masks=True)
LAYOUTS |= {f"blocks of {n}": training_layout(DOCUMENTS, n) for n in (1, 2, 4, 7, 16, 64)}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("chunk_len", [3, 16, 256])
def test_chunks_equal_the_dense_square_forward_and_backward(name, heads, kv_heads, chunk_len):
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(heads)
    shape = (*layout.position.shape, heads, 8)
    q = torch.randn(shape, generator=generator)
    k, v = (torch.randn(*layout.position.shape, kv_heads, 8, generator=generator) for _ in range(2))
    weight = torch.randn(shape, generator=generator)
    outputs, gradients = [], []
    for form in (DenseAttention, partial(PiecewiseAttention, clean_chunk=chunk_len, mask_chunk=chunk_len)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        output = form(layout)(0, *inputs)
        (output * weight).sum().backward()
        outputs.append(output.detach())
        gradients.append([x.grad for x in inputs])
    # fp32 softmax over at most 40 keys, summed in another order
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    for ours, dense in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)


def test_a_chunk_takes_the_keys_that_it_sees_and_few_others():
    """Runs begin and end at multiples of LENGTH_STEP, so that few shapes occur."""
    layout, step = training_layout(documents_row(70, 120), 4), LENGTH_STEP
    form = PiecewiseAttention(layout, clean_chunk=50, mask_chunk=50)
    visible = dense_visibility(layout, layout)[0]
    masks = [chunk for chunk, _ in form._pieces]
    assert [chunk.queries for chunk in masks] == [slice(0, 50), slice(50, 100), slice(100, 150), slice(150, 190)]
    for first, chunks in ((0, form._clean), (190, masks)):
        for chunk in chunks:
            rows = visible[first + chunk.queries.start : first + chunk.queries.stop]
            for run in chunk.runs:
                seen = rows[:, 190 * run.half : 190 * (run.half + 1)].any(0).nonzero()[:, 0]
                assert run.keys.start % step == 0
                assert run.keys.stop % step == 0 or run.keys.stop == 190
                assert run.keys.start <= int(seen[0]) < run.keys.start + step
                assert run.keys.stop - step <= int(seen[-1]) < run.keys.stop


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "next-token"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 64), (3, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_a_frozen_checkpoint_equal_the_dense_square_forward_and_backward(name, heads, kv_heads, size, dtype):
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(heads)
    S, real = layout.position.shape[1] // 2, layout.document[:, layout.position.shape[1] // 2 :] != PADDING
    whole = [torch.randn(*layout.position.shape, n, size, generator=generator).to(dtype)
             for n in (heads, kv_heads, kv_heads)]  # fmt: skip
    weight = torch.randn(*real.shape, heads, size, generator=generator) * real[..., None, None]
    outputs, gradients = [], []
    for form in (DenseAttention, PiecewiseAttention):
        attention = form(layout)
        exact = form is DenseAttention
        clean, masks = ([(x.float() if exact else x)[:, part] for x in whole] for part in (slice(S), slice(S, None)))
        masks = [x.clone().requires_grad_() for x in masks]
        attention.clean(0, *clean)
        output = attention.masks(0, *masks)
        assert exact or type(output.grad_fn).__name__ == "_MaskAttentionBackward"
        (output * weight).sum().backward()
        outputs.append((output.detach() * real[..., None, None]).float())
        gradients.append([(x.grad * real[..., None, None]).float() for x in masks])
    for ours, dense in zip((outputs[1], *gradients[1]), (outputs[0], *gradients[0])):
        # fp32: other order of sums; bf16: results are rounded once, of up to 3 queries' sums
        rounding = 1e-5 if dtype is torch.float32 else 2**-7
        torch.testing.assert_close(ours, dense, rtol=rounding, atol=rounding * float(dense.abs().max()))


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_masks_that_are_all_padding_gather_nothing():
    """As where no block of a row has a label."""
    layout = training_layout(torch.full((1, 8), PADDING), 4)
    attention, q = PiecewiseAttention(layout), torch.randn(1, 8, 2, 16, requires_grad=True)
    attention.clean(0, *[torch.randn(1, 8, 2, 16)] * 3)
    output = attention.masks(0, q, torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16))
    output.sum().backward()
    assert not output.any()
    assert not q.grad.any()


def test_what_is_no_run_of_keys_is_left_to_plain_products():
    visible, real = torch.ones(1, 2, 6, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    assert MaskRuns.of(visible, 4, real) is not None
    holes, apart = visible.clone(), visible.clone()
    holes[0, 0, 1] = False  # a clean key in the middle
    apart[0, :, 0] = torch.tensor([True, False])  # two parts, and each sees the mask of the other
    assert MaskRuns.of(holes, 4, real) is None
    assert MaskRuns.of(apart, 4, real) is None
