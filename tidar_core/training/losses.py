"""How wrong are both halves of a batch, as sums that any number of workers can add up?

    L = [ alpha * mean CE(AR) + mean CE(diffusion) ] / (1 + alpha)          (TiDAR, equation 3)

Each mean runs over all labels of the train step, on all workers; so sums and counts leave here, not means.

A recipe may weigh the labels of the diffusion half; its mean is then over what the weights add up to.

Shape letters: B rows, S tokens of a row, M tokens of its mask half, N labelled tokens, E embedding, V vocabulary,
K block length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tidar_core.training.dual_mode import IGNORED, TrainBatch

__all__ = ["LossSums", "chunk_loss", "dual_mode_loss", "label_counts", "loss_sums"]

LOGITS_AT_ONCE = 2**26
"""Logits held at a time; a vocabulary of 151,936 would need 5 GB for one row of 2 x 4,096 tokens otherwise."""
LOGITS_AT_ONCE_CUDA = 2**29
"""The same on an accelerator: 2 GB in fp32, so that 32,768 tokens of a vocabulary of 16,384 need no second pass."""

Head = Callable[[Tensor], Tensor]
Link = Callable[[Tensor], Tensor] | None
ChunkLoss = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the labelled tokens of one batch; the first two carry gradients."""

    ar_sum: Tensor
    diffusion_sum: Tensor
    ar_count: Tensor
    diffusion_count: Tensor
    """Labels, or what their weights add up to."""
    draft_hits_K: Tensor
    """Mask tokens whose likeliest token is the label, by offset in the block."""
    draft_count_K: Tensor


def chunk_loss(
    head: Head,
    hidden_NE: Tensor,
    target_N: Tensor,
    weight_N: Tensor | None = None,
    teacher_NE: Tensor | None = None,
    before_N: Tensor | None = None,
    distillation: float = 0.0,
    link: Link = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in fp32 summed over labels, and whose likeliest token is the label [N].

    weight_N      of each label; None: 1
    teacher_NE    hidden states whose distribution takes the share `distillation` of the label's place
    before_N      the tokens before the labels, of which `link` makes logits to add
    """
    logits_NV = head(hidden_NE).float()
    if link is not None and before_N is not None:
        logits_NV = logits_NV + link(before_N)
    hit_N = logits_NV.argmax(-1) == target_N
    if weight_N is None and teacher_NE is None:
        return F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="sum"), hit_N
    loss_N = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="none")
    if teacher_NE is not None:
        with torch.no_grad():
            teacher_NV = head(teacher_NE).float().softmax(-1)
        likely_NV = torch.where(teacher_NV > 0, logits_NV, 0.0)  # the mask token: probability 0, logit minus infinity
        soft_N = logits_NV.logsumexp(-1) - (teacher_NV * likely_NV).sum(-1)
        loss_N = torch.where(target_N != IGNORED, torch.lerp(loss_N, soft_N, distillation), 0.0)
    return (loss_N if weight_N is None else loss_N * weight_N).sum(), hit_N


def loss_sums(
    hidden_BLE: Tensor,
    head: Head,
    batch: TrainBatch,
    block_len: int,
    chunk_loss: ChunkLoss = chunk_loss,
    link: Link = None,
    clean_hidden: Callable[[Tensor], Tensor] = lambda hidden_BSE: hidden_BSE,
) -> LossSums:
    """Cross-entropy in nats, summed over labels, and draft accuracy. Never waits for the device.

    block_len     length of the longest block
    chunk_loss    the function of that name, or a compiled form of it
    link          the model's, if it has one: the diffusion half is then told the token before each label
    clean_hidden  from the clean half's hidden states here to those of whole rows
    """
    S = batch.ar_target_BS.shape[1]
    ar_sum, _ = _cross_entropy(head, batch.ar_target_BS, chunk_loss, hidden_BLE[:, :S])
    ar_count, diffusion_count = label_counts(batch)
    hits_K = torch.zeros(block_len, device=hidden_BLE.device)
    count_K = torch.zeros_like(hits_K)
    diffusion_sum = ar_sum.new_zeros(())
    if batch.diffusion_target_BM is not None:
        target_N = batch.diffusion_target_BM.flatten()
        teacher_BME = None
        if batch.teacher_BM is not None:
            whole_BSE = clean_hidden(hidden_BLE[:, :S].detach())
            teacher_BME = whole_BSE.gather(1, batch.teacher_BM[..., None].expand(-1, -1, whole_BSE.shape[-1]))
        diffusion_sum, hit_N = _cross_entropy(
            head, batch.diffusion_target_BM, chunk_loss, hidden_BLE[:, S:], batch.diffusion_weight_BM, teacher_BME,
            batch.before_BM if link else None, batch.distillation, link,
        )  # fmt: skip
        masks = batch.layout[:, S:]
        offset_N = (masks.position - masks.horizon - 1).flatten()
        hits_K.index_add_(0, offset_N, hit_N.float())
        count_K.index_add_(0, offset_N, (target_N != IGNORED).float())
    return LossSums(ar_sum, diffusion_sum, ar_count, diffusion_count, hits_K, count_K)


def label_counts(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Labels of the AR half and of the diffusion half, or what the weights of the latter add up to; known before any
    forward."""
    ar_count = (batch.ar_target_BS != IGNORED).sum()
    if batch.diffusion_target_BM is None:
        return ar_count, torch.zeros_like(ar_count)
    if batch.diffusion_total is not None:
        return ar_count, batch.diffusion_total
    return ar_count, (batch.diffusion_target_BM != IGNORED).sum()


def dual_mode_loss(sums: LossSums, alpha: float, ar_count: Tensor, diffusion_count: Tensor) -> Tensor:
    """The weighted loss; counts are those of the whole train step. AR loss alone where nothing is masked."""
    ar_mean, diffusion_mean = _mean(sums.ar_sum, ar_count), _mean(sums.diffusion_sum, diffusion_count)
    return torch.where(diffusion_count > 0, (alpha * ar_mean + diffusion_mean) / (1 + alpha), ar_mean)


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / torch.where(count > 0, count, 1).to(total.dtype)


def _cross_entropy(
    head: Head,
    target_BS: Tensor,
    of_chunk: ChunkLoss,
    hidden_BSE: Tensor,
    weight_BS: Tensor | None = None,
    teacher_BSE: Tensor | None = None,
    before_BS: Tensor | None = None,
    distillation: float = 0.0,
    link: Link = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and which labels were the likeliest token [B * S].

    Logits exist for a chunk of tokens at a time: where one chunk is not enough, each is computed again in the backward
    pass. Tokens without a label take part, so that shapes do not depend on what the rows hold.
    """
    hidden_NE, target_N = hidden_BSE.flatten(0, 1), target_BS.flatten()
    weight_N = None if weight_BS is None else weight_BS.flatten()
    teacher_NE = None if teacher_BSE is None else teacher_BSE.flatten(0, 1)
    before_N = None if before_BS is None else before_BS.flatten()
    with torch.no_grad():
        logits = head(hidden_NE[:1]).shape[-1] * (1 + (teacher_NE is not None) + (before_N is not None))
    at_once = max(1, (LOGITS_AT_ONCE_CUDA if hidden_NE.is_cuda else LOGITS_AT_ONCE) // logits)
    if len(target_N) <= at_once:
        return of_chunk(head, hidden_NE, target_N, weight_N, teacher_NE, before_N, distillation, link)
    chunks = -(-len(target_N) // at_once)
    chunk_len = -(-len(target_N) // chunks)  # as even as can be

    def pieces(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * chunks if x is None else x.split(chunk_len)

    sums, hits = zip(
        *(
            checkpoint(of_chunk, head, *piece, distillation, link, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*map(pieces, (hidden_NE, target_N, weight_N, teacher_NE, before_N)))
        )
    )
    return torch.stack(sums).sum(), torch.cat(hits)
