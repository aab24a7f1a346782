"""Prompts of held-out rows, from which checkpoints are compared by decoding."""

import pytest
import torch

from pipelines.training.continuations import held_out_prompts
from tidar_core.errors import ConfigError
from tidar_core.training.packing import PackedRows
from tidar_core.transformer.layout import PADDING

IDS = torch.arange(100, 124).view(2, 12)
DOCUMENTS = torch.tensor([[6] * 8 + [7] * 4, [8] * 9 + [PADDING] * 3])
ANSWERS = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1] + [0] * 4 + [1] * 4 + [0] * 3]).bool()


class Rows:
    """Rows as `ShardReader` returns them."""

    def __init__(self, trained):
        self.trained = trained

    def __len__(self):
        return len(IDS)

    def rows(self, index):
        return PackedRows(IDS[index], DOCUMENTS[index], None if self.trained is None else self.trained[index])


def test_the_prompt_of_a_document_is_its_first_quarter():
    assert held_out_prompts(Rows(None), 9, 64, 16) == [(100, 101), (108,), (112, 113)]
    assert held_out_prompts(Rows(None), 2, 64, 16) == [(100, 101), (108,)]


def test_the_prompt_of_a_conversation_ends_at_its_first_answer():
    """A document without an answer has no prompt; nor has one that begins with an answer."""
    assert held_out_prompts(Rows(ANSWERS), 9, 64, 16) == [(100, 101, 102)]


def test_prompts_leave_room_in_the_context():
    assert held_out_prompts(Rows(None), 9, 17, 16) == [(108,)]
    with pytest.raises(ConfigError, match="leaves 17 tokens of a context of 17; pack"):
        held_out_prompts(Rows(None), 9, 17, 17)
