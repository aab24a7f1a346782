"""Training forward of either objective, from packed rows to loss sums.

The checkpoint under a draft adapter is frozen, so in the dual objective its autoregressive loss has no weight and is
not computed.

The objective is a torch module, so that an engine that shards parameters sees every use of them inside one forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tidar_core.training.dual_mode import IGNORED, TrainBatch, ar_batch, dual_mode_batch
from tidar_core.training.flex_attention import FlexAttention
from tidar_core.training.losses import LossSums, chunk_loss, loss_sums
from tidar_core.training.recipe import Recipe
from tidar_core.training.sequence_parallel import SequenceParallel
from tidar_core.transformer.attention import PiecewiseAttention, SplitAttention
from tidar_core.transformer.layout import TokenLayout
from tidar_core.transformer.model import TidarModel

__all__ = ["Objective"]


class Objective(nn.Module):
    """Computes the loss sums of packed rows."""

    def __init__(
        self,
        model: TidarModel,
        *,
        dual: bool,
        block_len: int,
        recipe: Recipe | None = None,
        attention: Callable[[TokenLayout], SplitAttention] | None = None,
        shared: SequenceParallel | None = None,
        logits_at_once: int | None = None,
        ragged: bool = False,
    ) -> None:
        """dual       whether to train both halves; otherwise next-token prediction alone
        recipe     choices for both halves; `None`: the paper's
        attention  makes the attention for a batch's layout; `None` chooses by device
        shared     workers that share each row with this one; batches and sums are then this worker's part
        logits_at_once  logits that the loss holds at a time; `None` chooses by device
        ragged     compute blocks and logits only where labels are: shapes follow the labels, and the device is waited
                   for. Losses and gradients stay. Not under ZeRO 3, where all workers must call the head equally often.
        """
        super().__init__()
        assert not dual or model.config.drafting, "the dual objective needs a model with a mask token"
        recipe = (recipe or Recipe()).checked(block_len)
        self.recipe = recipe if model.adapter is None else recipe.frozen()
        self.model, self.dual, self.block_len = model, dual, block_len
        self.chunk_loss, self._shared, self._logits_at_once = chunk_loss, shared, logits_at_once
        self._ragged = ragged
        self._attention = attention or self._attention_of_device

    def batch(
        self,
        input_ids_BS: Tensor,
        document_BS: Tensor,
        trained_BS: Tensor | None = None,
        *,
        seed_B: Sequence[int] | None = None,
        share: float = 0.0,
    ) -> TrainBatch:
        """Inputs and labels of packed rows.

        document_BS  document of each token; PADDING for none
        trained_BS   whether a token is a label; `None`: all are
        seed_B       seed of each row's draws; needed if the recipe draws
        share        share of the run that is done, 0..1
        """
        if self.dual:
            mask_id = self.model.config.mask_id or 0  # an adapter does not read the ids of masks
            batch = dual_mode_batch(
                input_ids_BS, document_BS, self.block_len, mask_id, trained_BS, recipe=self.recipe, seed_B=seed_B,
                share=share, ragged=self._ragged, multiple=self._shared.workers if self._shared else 1,
                causal_masks=self.model.config.causal_masks,
            )  # fmt: skip
            if self.model.adapter is not None:
                batch = replace(batch, ar_target_BS=torch.full_like(batch.ar_target_BS, IGNORED), frozen=True)
        else:
            batch = ar_batch(input_ids_BS, document_BS, trained_BS)
        return self._shared.part(batch) if self._shared else batch

    def compile_parts(self) -> None:
        """Compile each layer and the loss in place, for constant shapes. All layers share one compiled form."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.chunk_loss = torch.compile(chunk_loss, dynamic=False)

    def forward(self, batch: TrainBatch) -> LossSums:
        """Loss sums over the labels of `batch`."""
        head, attention = self.model.head, self._attention(batch.whole or batch.layout)
        link = None if self.model.link is None else self.model.link_logits
        if self._shared is None:
            return loss_sums(
                self._hidden(batch, attention), head, batch, self.block_len, self.chunk_loss, link,
                logits_at_once=self._logits_at_once, ragged=self._ragged,
            )  # fmt: skip
        attention = self._shared.attention(attention, batch.ar_target_BS.shape[1])
        return loss_sums(
            self._hidden(batch, attention), head, batch, self.block_len, self.chunk_loss, link, self._shared.gathered,
            self._logits_at_once, self._ragged,
        )  # fmt: skip

    def _hidden(self, batch: TrainBatch, attention: SplitAttention) -> Tensor:
        """Hidden states [B, L, E] of this worker's tokens."""
        position_BL = batch.layout.position
        if self.model.adapter is None or batch.diffusion_target_BM is None:
            return self.model(batch.token_BL, position_BL, attention)
        masks = batch.layout[:, batch.ar_target_BS.shape[1] :]
        return self.model.adapted(batch.token_BL, position_BL, attention, masks.offset)

    def _attention_of_device(self, layout: TokenLayout) -> SplitAttention:
        table = self.model.embedding.weight
        if FlexAttention.suits(table.device, layout.position.shape[-1], self.model.config.head_size):
            return FlexAttention(layout, split=self.model.adapter is not None)
        return PiecewiseAttention(layout, table.dtype)
