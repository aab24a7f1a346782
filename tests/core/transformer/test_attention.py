"""Attention in chunks equals the dense square, forward and backward."""

from functools import partial

import pytest
import torch
from oracles import documents_row

from tidar_core.transformer.attention import DenseAttention, PiecewiseAttention
from tidar_core.transformer.layout import causal_layout, training_layout

DOCUMENTS = torch.cat([documents_row(20, 13, 7), documents_row(40), documents_row(3, 30, padding=7)])
LAYOUTS = {"next-token": causal_layout(DOCUMENTS), "mixed": training_layout(DOCUMENTS, torch.tensor([[2], [8], [5]]))}
LAYOUTS["phases"] = training_layout(DOCUMENTS, 8, torch.tensor([[7], [0], [3]]))
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


def test_a_chunk_takes_no_key_before_the_first_and_none_behind_the_last_that_it_sees():
    layout = training_layout(documents_row(8, 12), 4)
    form = PiecewiseAttention(layout, clean_chunk=5, mask_chunk=5)
    assert [(chunk.queries, *[(run.half, run.keys) for run in chunk.runs]) for chunk in form._clean] == [
        (slice(0, 5), (0, slice(0, 5))),
        (slice(5, 10), (0, slice(0, 10))),
        (slice(10, 15), (0, slice(8, 15))),
        (slice(15, 20), (0, slice(8, 20))),
    ]
    assert [(chunk.queries, *[(run.half, run.keys) for run in chunk.runs]) for chunk in form._masks] == [
        (slice(0, 5), (0, slice(0, 4)), (1, slice(0, 8))),
        (slice(5, 10), (0, slice(0, 4)), (1, slice(4, 12))),
        (slice(10, 15), (0, slice(8, 12)), (1, slice(8, 16))),
        (slice(15, 20), (0, slice(8, 16)), (1, slice(12, 20))),
    ]
