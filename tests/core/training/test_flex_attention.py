"""FlexAttention under the one rule equals the dense form, for any layout."""

import pytest
import torch
from oracles import documents_row

from tidar_core.training.flex_attention import FlexAttention
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout, training_layout
from tidar_core.transformer.visibility import dense_visibility

# Without a GPU the unfused form runs, which computes the same scores under the same tiles and the same rule.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

DOCUMENTS = torch.cat([documents_row(100, 83, 17), documents_row(200), documents_row(3, 150, padding=47)])
LAYOUTS = {
    "next-token": causal_layout(DOCUMENTS),
    "doubled, blocks of 16": training_layout(DOCUMENTS, 16),
    "doubled, blocks of 7": training_layout(DOCUMENTS, 7),
}


def inputs(layout, heads, kv_heads, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(heads)
    return tuple(
        torch.randn(*layout.position.shape, n, 16, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_flex_attention_gathers_what_the_dense_form_gathers(name, heads, kv_heads):
    layout = LAYOUTS[name]
    q, k, v = inputs(layout, heads, kv_heads)
    ours, dense = (form(layout)(0, q, k, v) for form in (FlexAttention, DenseAttention))
    # fp32 softmax over at most 216 keys, summed in another order
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tile_is_skipped_when_nothing_in_it_is_visible_and_free_of_the_rule_when_all_is(name):
    layout = LAYOUTS[name]
    visible = dense_visibility(layout, layout)
    mask = FlexAttention(layout).block_mask
    computed = mask.to_dense()[:, 0].bool()
    row_len = layout.position.shape[-1]
    for row in range(len(layout.position)):
        for q, first_query in enumerate(range(0, row_len, 128)):
            full = mask.full_kv_indices[row, 0, q, : mask.full_kv_num_blocks[row, 0, q]].tolist()
            for k, first_key in enumerate(range(0, row_len, 128)):
                tile = visible[row, first_query : first_query + 128, first_key : first_key + 128]
                assert computed[row, q, k] == tile.any()
                assert (k in full) == (tile.shape == (128, 128) and bool(tile.all()))


def test_tiles_judged_row_by_row_are_the_same():
    layout = LAYOUTS["doubled, blocks of 16"]
    together = FlexAttention(layout).block_mask
    apart = FlexAttention(layout, pairs_at_once=1).block_mask
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(together, name), getattr(apart, name))


def test_a_cpu_short_rows_and_narrow_heads_keep_their_own_forms():
    assert FlexAttention.suits(torch.device("cuda"), 2048, 64)
    assert not FlexAttention.suits(torch.device("cpu"), 2048, 64)
    assert not FlexAttention.suits(torch.device("cuda"), 64, 64)
    assert not FlexAttention.suits(torch.device("cuda"), 2048, 8)


def test_one_compiled_layer_serves_every_layer_and_every_layout(model):
    """Else a run would compile again for each of its batches."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    layers = [type(layer)(model.config, index) for index, layer in enumerate(model.layers)]
    for layer in layers:
        layer.compile(backend=counter, dynamic=False, fullgraph=True)
    hidden = torch.randn(3, 400, 32)
    with torch.no_grad():
        for block_len in (4, 7, 16):
            layout = training_layout(DOCUMENTS, block_len)
            rotation = model.rotation(layout.position, hidden.dtype)
            for layer in layers:
                assert layer(hidden, rotation, FlexAttention(layout)).isfinite().all()
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_the_backward_pass_is_the_dense_ones_too(name, dtype, tolerance):
    layout = LAYOUTS[name].apply(lambda fact: fact.cuda())
    real = (layout.document >= 0)[..., None, None]
    found = []
    for form, precision in ((FlexAttention, dtype), (DenseAttention, torch.float64)):
        leaves = [x.to(precision).requires_grad_() for x in inputs(layout, 6, 2, dtype, "cuda")]
        output = form(layout)(0, *leaves) * real
        output.square().sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*found):
        # relative to the 2-norm: products of fp32 and of bf16 inputs
        assert (ours.double() - exact).norm() / exact.norm() < tolerance
