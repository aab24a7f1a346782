"""How wrong are both halves of a batch, as sums that any number of workers can add up?

    L = [ alpha * mean CE(AR) + mean CE(diffusion) ] / (1 + alpha)          (TiDAR, equation 3)

Each mean runs over all labels of the train step, on all workers; so sums and counts leave here, not means.

Shape letters: B rows, S tokens of a row, N labelled tokens, E embedding, V vocabulary, K block length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tidar_core.dual_mode import IGNORED, TrainBatch

__all__ = ["LossSums", "chunk_loss", "dual_mode_loss", "label_counts", "loss_sums"]

LOGITS_AT_ONCE = 2**26
"""Logits held at a time; a vocabulary of 151,936 would need 5 GB for one row of 2 x 4,096 tokens otherwise."""
LOGITS_AT_ONCE_CUDA = 2**29
"""The same on an accelerator: 2 GB in fp32, so that 32,768 tokens of a vocabulary of 16,384 need no second pass."""

Head = Callable[[Tensor], Tensor]
ChunkLoss = Callable[[Head, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the labelled tokens of one batch; the first two carry gradients."""

    ar_sum: Tensor
    diffusion_sum: Tensor
    ar_count: Tensor
    diffusion_count: Tensor
    draft_hits_K: Tensor
    """Mask tokens whose likeliest token is the label, by offset in the block."""
    draft_count_K: Tensor


def chunk_loss(head: Head, hidden_NE: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in fp32 summed over labels, and whose likeliest token is the label [N]."""
    logits_NV = head(hidden_NE).float()
    loss = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="sum")
    return loss, logits_NV.argmax(-1) == target_N


def loss_sums(
    hidden_BLE: Tensor, head: Head, batch: TrainBatch, block_len: int, chunk_loss: ChunkLoss = chunk_loss
) -> LossSums:
    """Cross-entropy in nats, summed over labels, and draft accuracy. Never waits for the device.

    chunk_loss  the function of that name, or a compiled form of it
    """
    S = batch.ar_target_BS.shape[1]
    ar_sum, _ = _cross_entropy(hidden_BLE[:, :S], head, batch.ar_target_BS, chunk_loss)
    ar_count, diffusion_count = label_counts(batch)
    hits_K = torch.zeros(block_len, device=hidden_BLE.device)
    count_K = torch.zeros_like(hits_K)
    diffusion_sum = ar_sum.new_zeros(())
    if batch.diffusion_target_BS is not None:
        target_N = batch.diffusion_target_BS.flatten()
        diffusion_sum, hit_N = _cross_entropy(hidden_BLE[:, S:], head, batch.diffusion_target_BS, chunk_loss)
        offset_N = (batch.layout.position[:, S:] % block_len).flatten()
        hits_K.index_add_(0, offset_N, hit_N.float())
        count_K.index_add_(0, offset_N, (target_N != IGNORED).float())
    return LossSums(ar_sum, diffusion_sum, ar_count, diffusion_count, hits_K, count_K)


def label_counts(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Labels of the AR half and of the diffusion half; known before any forward."""
    ar_count = (batch.ar_target_BS != IGNORED).sum()
    if batch.diffusion_target_BS is None:
        return ar_count, torch.zeros_like(ar_count)
    return ar_count, (batch.diffusion_target_BS != IGNORED).sum()


def dual_mode_loss(sums: LossSums, alpha: float, ar_count: Tensor, diffusion_count: Tensor) -> Tensor:
    """The weighted loss; counts are those of the whole train step. AR loss alone where nothing is masked."""
    ar_mean = sums.ar_sum / ar_count.clamp(min=1)
    both = (alpha * ar_mean + sums.diffusion_sum / diffusion_count.clamp(min=1)) / (1 + alpha)
    return torch.where(diffusion_count > 0, both, ar_mean)


def _cross_entropy(hidden_BSE: Tensor, head: Head, target_BS: Tensor, of_chunk: ChunkLoss) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and which labels were the likeliest token [B * S].

    Logits exist for a chunk of tokens at a time: where one chunk is not enough, each is computed again in the backward
    pass. Tokens without a label take part, so that shapes do not depend on what the rows hold.
    """
    hidden_NE, target_N = hidden_BSE.flatten(0, 1), target_BS.flatten()
    with torch.no_grad():
        vocab_size = head(hidden_NE[:1]).shape[-1]
    at_once = max(1, (LOGITS_AT_ONCE_CUDA if hidden_NE.is_cuda else LOGITS_AT_ONCE) // vocab_size)
    if len(target_N) <= at_once:
        return of_chunk(head, hidden_NE, target_N)
    chunk_len = -(-len(target_N) // -(-len(target_N) // at_once))  # as even as can be
    chunks = zip(hidden_NE.split(chunk_len), target_N.split(chunk_len))
    sums, hits = zip(
        *(checkpoint(of_chunk, head, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    )
    return torch.stack(sums).sum(), torch.cat(hits)
