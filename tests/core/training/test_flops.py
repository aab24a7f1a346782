"""Arithmetic that a train step needs, by hand."""

import pytest
import torch
from oracles import documents_row

from tidar_core.training.flops import layout_pairs, matmul_peak, matmul_weights, train_flops, visible_pairs
from tidar_core.transformer.layout import training_layout
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape
from tidar_core.transformer.visibility import dense_visibility


def test_weights_that_multiply_are_the_models_matrices():
    for name in ("tiny", "quickstart", "qwen3-125m"):
        config = named_shape(name)
        with torch.device("meta"):
            model = TidarModel(config)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert matmul_weights(config) == matrices  # tied heads: the table is counted once, as the head


def test_pairs_of_a_small_row_by_hand():
    row = documents_row(4, 2, padding=1)
    assert visible_pairs(row) == 1 + 2 + 3 + 4 + 1 + 2
    # blocks of 3: masks 0..2 see 9 pairs; mask 3 sees three clean tokens and itself; the two of document 1 see 4 pairs
    assert visible_pairs(row, 3) == 13 + 9 + 3 + 1 + 4


@pytest.mark.parametrize("block_len", [1, 4, 7])
def test_pairs_are_those_that_the_rule_lets_see(block_len):
    rows = torch.cat([documents_row(20, 13, 7), documents_row(40), documents_row(3, 30, padding=7)])
    layout = training_layout(rows, block_len)
    real = layout.document >= 0
    visible = dense_visibility(layout, layout) & real[:, :, None]
    assert visible_pairs(rows, block_len) == int(visible.sum())
    for causal_masks in (False, True):
        shifted = training_layout(rows, block_len, block_len - 1, causal_masks=causal_masks)
        visible = dense_visibility(shifted, shifted) & real[:, :, None]
        assert layout_pairs(shifted) == visible.sum()


def test_flops_of_one_token_by_hand():
    config = named_shape("tiny")  # 2 layers, 32 wide, 64 inside, 4 heads and 2 key heads of 8, 512 tokens
    layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 64
    assert matmul_weights(config) == 2 * layer + 32 * 512 == 34_816
    assert train_flops(config, tokens=10, pairs=55) == 6 * 34_816 * 10 + 12 * 2 * 4 * 8 * 55


def test_the_peak_is_that_of_a_product():
    assert matmul_peak(torch.device("cpu"), torch.float32, size=64, repeats=2) > 0
