"""Documents become rows; every token lands exactly once."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_core.training.packing import Span, cut_rows, overlapping_spans, row_count
from tidar_core.transformer.layout import PADDING

EOS = 0


def pack_all(documents, row_len, start=0, stop=None, first_document=0):
    tokens_T = torch.tensor([token for document in documents for token in document])
    lengths_N = torch.tensor([len(document) for document in documents])
    return cut_rows(
        tokens_T,
        lengths_N,
        first_document=first_document,
        start=start,
        stop=len(tokens_T) if stop is None else stop,
        row_len=row_len,
        eos_id=EOS,
    )


def test_two_documents_in_rows_of_four():
    rows = pack_all([[5, 6, EOS], [7, 8, EOS]], row_len=4)
    assert rows.input_ids_BS.tolist() == [[5, 6, 0, 7], [8, 0, 0, 0]]
    assert rows.document_ids_BS.tolist() == [[0, 0, 0, 1], [1, 1, PADDING, PADDING]]
    assert rows.input_ids_BS.dtype == rows.document_ids_BS.dtype == torch.int32


def test_a_piece_is_cut_with_the_ordinals_of_the_whole():
    rows = pack_all([[5, 6, EOS], [7, 8, EOS]], row_len=2, start=1, stop=5, first_document=40)
    assert rows.input_ids_BS.tolist() == [[6, 0], [7, 8]]
    assert rows.document_ids_BS.tolist() == [[40, 40], [41, 41]]


def test_flags_go_with_their_tokens_and_padding_has_none():
    tokens_T, trained_T = torch.tensor([5, 6, EOS, 7, EOS]), torch.tensor([False, True, True, False, True])
    place = {"first_document": 0, "row_len": 3, "eos_id": EOS}
    rows = cut_rows(tokens_T, torch.tensor([3, 2]), trained_T, start=1, stop=5, **place)
    assert rows.input_ids_BS.tolist() == [[6, 0, 7], [0, 0, 0]]
    assert rows.trained_BS.tolist() == [[True, True, False], [True, False, False]]
    assert cut_rows(tokens_T, torch.tensor([3, 2]), start=0, stop=5, **place).trained_BS is None


def test_spans_of_three_parts():
    assert overlapping_spans([0, 4, 6, 11], 3, 8) == [Span(0, 3, 4), Span(1, 0, 2), Span(2, 0, 2)]
    assert overlapping_spans([0, 4, 4, 9], 4, 99) == [Span(2, 0, 5)]
    assert overlapping_spans([0, 4, 6], 6, 9) == []


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_row_count_rounds_up(tokens, rows):
    assert row_count(tokens, 4) == rows


DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=9).map(lambda d: [*d, EOS]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(1, 7))
def test_every_token_lands_exactly_once_in_order_under_its_document(documents, row_len):
    rows = pack_all(documents, row_len)
    landed = [
        (token, document)
        for row, ids in zip(rows.input_ids_BS.tolist(), rows.document_ids_BS.tolist())
        for token, document in zip(row, ids)
        if document != PADDING
    ]
    assert landed == [(token, ordinal) for ordinal, document in enumerate(documents) for token in document]
    assert rows.input_ids_BS.numel() - len(landed) < row_len


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(1, 5), st.integers(1, 3))
def test_pieces_cut_on_their_own_are_the_rows_of_the_whole(documents, row_len, rows_per_piece):
    whole = pack_all(documents, row_len)
    lengths = [len(document) for document in documents]
    total, step = sum(lengths), row_len * rows_per_piece
    pieces = []
    for start in range(0, total, step):
        stop = min(start + step, total)
        spans = overlapping_spans([0, *accumulate(lengths)], start, stop)  # here every document is a part of its own
        first, last = spans[0].part, spans[-1].part
        begin = sum(lengths[:first])
        pieces.append(pack_all(documents[first : last + 1], row_len, start - begin, stop - begin, first))
    assert torch.equal(torch.cat([piece.input_ids_BS for piece in pieces]), whole.input_ids_BS)
    assert torch.equal(torch.cat([piece.document_ids_BS for piece in pieces]), whole.document_ids_BS)
