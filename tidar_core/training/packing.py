"""Packing of documents into rows of one length.

A split is one stream of tokens: its documents in order, the end-of-text token after each. Row r holds the tokens
[r * row_len, (r + 1) * row_len) of the stream. So every token is in exactly one row, and only the tail of the last row
is padding. Any section of the stream can be cut on its own, given its documents and where they begin. So many workers
write one split without communication.

Shape letters: T tokens of a section of the stream, N documents in it, B rows, S row_len.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_core.transformer.layout import PADDING

__all__ = ["PackedRows", "Span", "cut_rows", "overlapping_spans", "row_count"]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of tokens and the documents that they belong to."""

    input_ids_BS: Tensor
    document_ids_BS: Tensor
    """Ordinal of the document within its split; PADDING if there is no token, and the input id is then end of text."""
    trained_BS: Tensor | None = None
    """Whether a token is a label, as the tokens of a response are; `None`: all tokens are."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one part of a stream."""

    part: int
    start: int
    stop: int


def row_count(tokens: int, row_len: int) -> int:
    """Number of rows that a stream of `tokens` fills; the last may be partly filled."""
    return -(-tokens // row_len)


def overlapping_spans(part_begins: Sequence[int], start: int, stop: int) -> list[Span]:
    """Spans of the parts that hold the tokens [start, stop) of a stream.

    Tokens beyond the end of the stream have no span.

    part_begins  part p holds the tokens [part_begins[p], part_begins[p + 1]) of the stream
    """
    spans = []
    part = max(bisect_right(part_begins, start) - 1, 0)
    while part + 1 < len(part_begins) and part_begins[part] < stop:
        begin, end = part_begins[part], part_begins[part + 1]
        if start < end and begin < end:
            spans.append(Span(part, max(start - begin, 0), min(stop, end) - begin))
        part += 1
    return spans


def cut_rows(
    tokens_T: Tensor,
    document_len_N: Tensor,
    trained_T: Tensor | None = None,
    *,
    first_document: int,
    start: int,
    stop: int,
    row_len: int,
    eos_id: int,
) -> PackedRows:
    """Tokens [start, stop) of a section of the stream as rows; int32.

    tokens_T          documents of the section in order, each with its end-of-text token
    document_len_N    tokens of each document, end-of-text token included
    trained_T         whether a token is a label; `None`: all are
    first_document    ordinal of the first of these documents within the split
    eos_id            token that fills the tail of the last row
    """
    assert int(document_len_N.sum()) == len(tokens_T), "document lengths do not add up to the tokens"
    assert 0 <= start < stop <= len(tokens_T), f"tokens [{start}, {stop}) of a section of {len(tokens_T)}"
    document_N = torch.arange(first_document, first_document + len(document_len_N), dtype=torch.int32)
    document_T = document_N.repeat_interleave(document_len_N.long())
    rows = row_count(stop - start, row_len)
    input_ids_BS = torch.full((rows, row_len), eos_id, dtype=torch.int32)
    document_ids_BS = torch.full((rows, row_len), PADDING, dtype=torch.int32)
    input_ids_BS.view(-1)[: stop - start] = tokens_T[start:stop]
    document_ids_BS.view(-1)[: stop - start] = document_T[start:stop]
    trained_BS = None
    if trained_T is not None:
        trained_BS = torch.zeros((rows, row_len), dtype=torch.bool)
        trained_BS.view(-1)[: stop - start] = trained_T[start:stop]
    return PackedRows(input_ids_BS, document_ids_BS, trained_BS)
