"""The split form of the doubled row equals the dense one, forward and backward."""

import pytest
import torch
from oracles import documents_row

from tidar_core.attention import DenseAttention, DualModeAttention
from tidar_core.layout import training_layout


@pytest.mark.parametrize("block_len", [1, 2, 4, 7, 16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_split_rows_equal_the_dense_square_forward_and_backward(block_len, heads, kv_heads):
    documents = torch.cat([documents_row(20, 13, 7), documents_row(40), documents_row(3, 30, padding=7)])
    layout = training_layout(documents, block_len)
    generator = torch.Generator().manual_seed(block_len)
    shape = (*layout.position.shape, heads, 8)
    q = torch.randn(shape, generator=generator)
    k, v = (torch.randn(*layout.position.shape, kv_heads, 8, generator=generator) for _ in range(2))
    real = (layout.document >= 0)[..., None, None]
    weight = torch.randn(shape, generator=generator) * real
    outputs, gradients = [], []
    for attention in (DenseAttention(layout), DualModeAttention(layout, block_len)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attention(0, *inputs) * real
        (output * weight).sum().backward()
        outputs.append(output.detach())
        gradients.append([x.grad for x in inputs])
    # fp32 softmax over at most 40 keys, summed in another order
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    for ours, dense in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
