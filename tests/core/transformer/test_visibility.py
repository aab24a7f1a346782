"""Visibility: the pictures of the paper, then the rule over many layouts."""

import pytest
import torch
from oracles import decode_visibility, documents_row, training_visibility

from tidar_core.transformer.layout import decode_layout, training_layout
from tidar_core.transformer.visibility import dense_visibility, flex_rule

DOCUMENTS = [(6,), (5, 3), (1, 7, 2), (4, 4, 4, 1)]
BLOCK_LENS = [1, 2, 3, 4, 8]

TRAINING_PICTURE = """
1 . . . . . . . . . . .
1 1 . . . . . . . . . .
1 1 1 . . . . . . . . .
1 1 1 1 . . . . . . . .
1 1 1 1 1 . . . . . . .
1 1 1 1 1 1 . . . . . .
. . . . . . 1 1 1 . . .
. . . . . . 1 1 1 . . .
. . . . . . 1 1 1 . . .
1 1 1 . . . . . . 1 1 1
1 1 1 . . . . . . 1 1 1
1 1 1 . . . . . . 1 1 1
"""
DECODE_PICTURE = """
1 1 1 1 . . . . .
1 1 1 1 1 . . . .
1 1 1 1 . 1 1 . .
1 1 1 1 . 1 1 . .
1 1 1 1 1 . . 1 1
1 1 1 1 1 . . 1 1
"""


CAUSAL_PICTURE = """
1 1 1 1 . . . . .
1 1 1 1 1 . . . .
1 1 1 1 . 1 . . .
1 1 1 1 . 1 1 . .
1 1 1 1 1 . . 1 .
1 1 1 1 1 . . 1 1
"""


def picture(text):
    return torch.tensor([[cell == "1" for cell in line.split()] for line in text.strip().splitlines()])


def training_square(documents, block_len, phase=0):
    layout = training_layout(documents_row(*documents), block_len, phase)
    return dense_visibility(layout, layout)[0]


def decode_columns(prefix_len, block_len, *, causal_masks=False):
    """Query tokens of a decode step against prefix tokens, drafts and masks, in that order."""
    prefix = torch.tensor([prefix_len])
    rows = decode_layout(prefix, block_len, range(1, block_len + 1), block_len, causal_masks=causal_masks)
    keys = decode_layout(torch.tensor([0]), prefix_len, (), 1).then(rows)
    return dense_visibility(rows, keys)[0]


def test_the_doubled_row_is_the_picture_of_six_tokens_in_blocks_of_three():
    assert torch.equal(training_square((6,), 3), picture(TRAINING_PICTURE))


def test_a_decode_step_is_the_picture_of_two_drafts_and_two_groups():
    assert torch.equal(decode_columns(3, 2), picture(DECODE_PICTURE))


def test_of_causal_masks_none_sees_a_later_one_in_a_decode_step():
    assert torch.equal(decode_columns(3, 2, causal_masks=True), picture(CAUSAL_PICTURE))


@pytest.mark.parametrize("phase", [0, 2])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_of_causal_masks_none_sees_a_later_one_in_a_doubled_row(documents, phase):
    layout = training_layout(documents_row(*documents), 4, phase, causal_masks=True)
    token = torch.arange(2 * sum(documents))  # masks come last, in the order of their positions
    later = (token >= sum(documents)) & (token > token[:, None])
    assert torch.equal(dense_visibility(layout, layout)[0], training_visibility(documents, 4, phase) & ~later)


@pytest.mark.parametrize("block_len", BLOCK_LENS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_documents_see_what_a_double_loop_finds(documents, block_len):
    for phase in {0, block_len // 2, block_len - 1}:
        square = training_square(documents, block_len, phase)
        assert torch.equal(square, training_visibility(documents, block_len, phase))


@pytest.mark.parametrize("block_len", [1, 2, 3, 5])
def test_query_tokens_of_a_decode_step_see_what_a_double_loop_finds(block_len):
    assert torch.equal(decode_columns(4, block_len), decode_visibility(4, block_len))


@pytest.mark.parametrize("block_len", BLOCK_LENS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_mask_token_never_sees_the_token_it_must_predict(documents, block_len):
    visible = training_square(documents, block_len)
    S = sum(documents)
    assert not visible[S:, :S].diagonal().any()


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_clean_token_never_sees_a_mask_token(documents):
    S = sum(documents)
    assert not training_square(documents, 4)[:S, S:].any()


def test_every_token_sees_itself_so_that_no_softmax_is_empty():
    for documents in DOCUMENTS:
        assert training_square(documents, 4).diagonal().all()
    layout = training_layout(documents_row(3, padding=2), 2)
    assert dense_visibility(layout, layout)[0].diagonal().all()


def test_padding_and_documents_do_not_see_each_other():
    layout = training_layout(documents_row(3, padding=2), 2)
    visible = dense_visibility(layout, layout)[0]
    real = layout.document[0] >= 0
    assert not visible[real][:, ~real].any()
    assert not visible[~real][:, real].any()


def test_a_pre_draft_sees_exactly_what_the_training_block_at_its_place_saw():
    prefix_len, block_len, accepted = 5, 3, 1
    start = prefix_len + accepted  # a multiple of block_len, so that training has a block there
    decoded = decode_columns(prefix_len, block_len)
    group = decoded[block_len + (accepted - 1) * block_len :][:block_len]
    trained = training_square((9,), block_len)[9 + start : 9 + start + block_len]
    assert group[:, :start].all()
    assert trained[:, :start].all()
    assert not group[:, start : prefix_len + block_len].any()
    assert not trained[:, start:9].any()


def test_the_flex_form_uses_the_same_rule():
    layout = training_layout(documents_row(5, 3, padding=2), 2)
    L = layout.position.shape[1]
    rule = flex_rule(layout, layout)
    index = torch.arange(L)
    square = rule(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    assert torch.equal(square, dense_visibility(layout, layout)[0])
