"""What does one training forward compute, start to end, for either objective?

A module of its own, so that an engine that shards parameters sees every use of them inside one forward.
"""

import torch
from torch import Tensor, nn

from tidar_core.attention import DenseAttention, DualModeAttention
from tidar_core.dual_mode import TrainBatch, ar_batch, dual_mode_batch
from tidar_core.losses import LossSums, loss_sums
from tidar_core.model import TidarModel

__all__ = ["Objective"]


class Objective(nn.Module):
    """Packed rows -> sums of the losses."""

    def __init__(self, model: TidarModel, *, dual: bool, block_len: int) -> None:
        """dual  both halves; otherwise next-token prediction alone."""
        super().__init__()
        assert not dual or model.config.mask_id is not None, "the dual objective needs a model with a mask token"
        self.model, self.dual, self.block_len = model, dual, block_len

    def batch(self, input_ids_BS: Tensor, document_BS: Tensor) -> TrainBatch:
        """Inputs and labels of packed rows."""
        if not self.dual:
            return ar_batch(input_ids_BS, document_BS)
        mask_id = self.model.config.mask_id
        assert mask_id is not None
        return dual_mode_batch(input_ids_BS, document_BS, self.block_len, mask_id)

    def forward(self, batch: TrainBatch) -> LossSums:
        """Loss sums over the labels of `batch`."""
        dtype: torch.dtype = self.model.embedding.weight.dtype
        attention = (
            DualModeAttention(batch.layout, self.block_len, dtype) if self.dual else DenseAttention(batch.layout)
        )
        hidden_BLE = self.model(batch.token_BL, batch.layout.position, attention)
        return loss_sums(hidden_BLE, self.model.head, batch, self.block_len)
