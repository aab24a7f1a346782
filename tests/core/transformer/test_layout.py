"""Layouts: the position ids of the paper, typed out."""

import torch
from oracles import documents_row

from tidar_core.transformer.layout import CLEAN, PADDING, causal_layout, decode_layout, training_layout


def test_both_halves_of_the_doubled_row_carry_the_same_positions():
    layout = training_layout(documents_row(6), 3)
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]
    assert layout.block.tolist() == [[CLEAN] * 6 + [0, 0, 0, 1, 1, 1]]
    assert layout.horizon.tolist() == [[0, 1, 2, 3, 4, 5, -1, -1, -1, 2, 2, 2]]


def test_positions_and_blocks_restart_at_each_document():
    layout = training_layout(documents_row(5, 3), 2)
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2] * 2]
    assert layout.block[0, 8:].tolist() == [0, 0, 1, 1, 2, 0, 0, 1]
    assert layout.horizon[0, 8:].tolist() == [-1, -1, 1, 1, 3, -1, -1, 1]


def test_a_phase_shortens_the_first_block_of_each_document():
    layout = training_layout(documents_row(5, 3), 3, phase=1)
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2] * 2]
    assert layout.block[0, 8:].tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    assert layout.horizon[0, 8:].tolist() == [-1, -1, 1, 1, 1, -1, -1, 1]


def test_a_document_that_appears_again_after_another_is_the_same_document_at_new_positions():
    layout = causal_layout(torch.tensor([[7, 7, 9, PADDING]]))
    assert layout.position.tolist() == [[0, 1, 0, 0]]
    assert layout.document.tolist() == [[7, 7, 9, PADDING]]


def test_position_ids_of_a_decode_step_are_those_of_the_papers_figure_3():
    layout = decode_layout(torch.tensor([3]), 3, (1, 2, 3), 3)
    assert layout.position.tolist() == [[3, 4, 5, 4, 5, 6, 5, 6, 7, 6, 7, 8]]
    assert layout.horizon.tolist() == [[3, 4, 5, 3, 3, 3, 4, 4, 4, 5, 5, 5]]
    assert layout.block.tolist() == [[CLEAN] * 3 + [1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_a_decode_step_has_one_row_per_draft_and_per_mask_of_each_group():
    for block_len in (1, 2, 4, 16):
        layout = decode_layout(torch.tensor([5, 9]), block_len, range(1, block_len + 1), block_len)
        assert layout.position.shape == (2, block_len * (block_len + 1))


def test_ragged_prefixes_shift_positions_and_nothing_else():
    both = decode_layout(torch.tensor([3, 11]), 2, (1, 2), 2)
    assert (both.position[1] - both.position[0]).tolist() == [8] * 6
    assert both.block[0].tolist() == both.block[1].tolist()


def test_prefill_reads_the_prompt_causally_and_puts_one_block_behind_it():
    layout = decode_layout(torch.tensor([0]), 4, (4,), 2)
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert layout.horizon.tolist() == [[0, 1, 2, 3, 3, 3]]
