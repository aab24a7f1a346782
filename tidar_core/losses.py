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

__all__ = ["LossSums", "dual_mode_loss", "label_counts", "loss_sums"]

LOGITS_AT_ONCE = 2**26
"""Logits held at a time; a vocabulary of 151,936 would need 5 GB for one row of 2 x 4,096 tokens otherwise."""

Head = Callable[[Tensor], Tensor]


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


def loss_sums(hidden_BLE: Tensor, head: Head, batch: TrainBatch, block_len: int) -> LossSums:
    """Cross-entropy in nats, summed over labels, and draft accuracy."""
    S = batch.ar_target_BS.shape[1]
    ar_sum, _ = _cross_entropy(hidden_BLE[:, :S], head, batch.ar_target_BS)
    ar_count, diffusion_count = label_counts(batch)
    hits_K = torch.zeros(block_len, device=hidden_BLE.device)
    count_K = torch.zeros_like(hits_K)
    diffusion_sum = ar_sum.new_zeros(())
    if batch.diffusion_target_BS is not None:
        target_BS = batch.diffusion_target_BS
        diffusion_sum, hit_N = _cross_entropy(hidden_BLE[:, S:], head, target_BS)
        offset_N = (batch.layout.position[:, S:] % block_len)[target_BS != IGNORED]
        hits_K.index_add_(0, offset_N, hit_N.float())
        count_K.index_add_(0, offset_N, torch.ones_like(hit_N, dtype=torch.float32))
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
    if not diffusion_count:
        return ar_mean
    return (alpha * ar_mean + sums.diffusion_sum / diffusion_count) / (1 + alpha)


def _cross_entropy(hidden_BSE: Tensor, head: Head, target_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in fp32, and which labelled tokens were the likeliest [N].

    Logits exist for labelled tokens only, and for a chunk of them at a time: where one chunk is not enough, each is
    computed again in the backward pass.
    """
    labelled = target_BS != IGNORED
    hidden_NE, target_N = hidden_BSE[labelled], target_BS[labelled]
    if not len(target_N):
        return hidden_BSE.sum() * 0.0, labelled.new_zeros(0)
    vocab_size = head(hidden_NE[:1].detach()).shape[-1]
    chunk_len = max(1, LOGITS_AT_ONCE // vocab_size)

    def of_chunk(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        return F.cross_entropy(logits, target, reduction="sum"), logits.argmax(-1) == target

    chunks = list(zip(hidden_NE.split(chunk_len), target_N.split(chunk_len)))
    if len(chunks) == 1:
        return of_chunk(*chunks[0])
    sums, hits = zip(*(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks))
    return torch.stack(sums).sum(), torch.cat(hits)
