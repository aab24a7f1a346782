"""What does one training forward compute, start to end, for either objective?

A module of its own, so that an engine that shards parameters sees every use of them inside one forward.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tidar_core.attention import Attention, DenseAttention, DualModeAttention
from tidar_core.dual_mode import TrainBatch, ar_batch, dual_mode_batch
from tidar_core.flex import FlexAttention
from tidar_core.layout import TokenLayout
from tidar_core.losses import LossSums, chunk_loss, loss_sums
from tidar_core.model import TidarModel

__all__ = ["Objective"]


class Objective(nn.Module):
    """Packed rows -> sums of the losses."""

    def __init__(
        self,
        model: TidarModel,
        *,
        dual: bool,
        block_len: int,
        attention: Callable[[TokenLayout], Attention] | None = None,
    ) -> None:
        """dual       both halves; otherwise next-token prediction alone
        attention  form for a batch's layout; None chooses by device
        """
        super().__init__()
        assert not dual or model.config.mask_id is not None, "the dual objective needs a model with a mask token"
        self.model, self.dual, self.block_len = model, dual, block_len
        self.chunk_loss = chunk_loss
        self._attention = attention or self._attention_of_device

    def batch(self, input_ids_BS: Tensor, document_BS: Tensor) -> TrainBatch:
        """Inputs and labels of packed rows."""
        if not self.dual:
            return ar_batch(input_ids_BS, document_BS)
        mask_id = self.model.config.mask_id
        assert mask_id is not None
        return dual_mode_batch(input_ids_BS, document_BS, self.block_len, mask_id)

    def compile_parts(self) -> None:
        """Compile each layer and the loss, in place, for shapes that stay. All layers share one compiled form."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.chunk_loss = torch.compile(chunk_loss, dynamic=False)

    def forward(self, batch: TrainBatch) -> LossSums:
        """Loss sums over the labels of `batch`."""
        hidden_BLE = self.model(batch.token_BL, batch.layout.position, self._attention(batch.layout))
        return loss_sums(hidden_BLE, self.model.head, batch, self.block_len, self.chunk_loss)

    def _attention_of_device(self, layout: TokenLayout) -> Attention:
        table = self.model.embedding.weight
        if FlexAttention.suits(table.device, layout.position.shape[-1], self.model.config.head_size):
            return FlexAttention(layout)
        return DualModeAttention(layout, self.block_len, table.dtype) if self.dual else DenseAttention(layout)
