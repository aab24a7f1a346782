"""Losses of both halves of a batch, as sums that any number of workers can add up.

    L = [ alpha * mean CE(AR) + mean CE(diffusion) ] / (1 + alpha)          (TiDAR, equation 3)

Each mean runs over all labels of the train step, on all workers; so this module returns sums and counts, not means.

A recipe may weight the labels of the diffusion half; its mean then divides by the sum of the weights.

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

__all__ = ["LossMeans", "LossSums", "LossTotals", "chunk_loss", "dual_mode_loss", "label_counts", "loss_sums"]

LOGITS_AT_ONCE = 2**26
"""Logits held at a time. Without a limit, a row of 2 x 4,096 tokens would need 5 GB with a vocabulary of 151,936."""
LOGITS_AT_ONCE_CUDA = 2**29
"""Logits held at a time on an accelerator: 2 GB in fp32. So 32,768 tokens of a vocabulary of 16,384 need no second
pass."""

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
    """Number of labels, or the sum of their weights."""
    draft_hits_K: Tensor
    """Mask tokens whose likeliest token is the label, by offset in the block."""
    draft_count_K: Tensor
    """Labelled mask tokens, by offset in the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMeans:
    """Mean losses in nats per token, and the accuracy of the likeliest draft token by offset in the block.

    `None` stands for a mean over no labels, which was not measured.
    """

    ar_loss: float | None
    diffusion_loss: float | None
    draft_accuracy_K: list[float | None]


class LossTotals:
    """Loss sums over any number of batches, in fp64; the `parts` of several workers add up."""

    def __init__(self, block_len: int, device: torch.device) -> None:
        self.parts = torch.zeros(4 + 2 * block_len, dtype=torch.float64, device=device)

    def add(self, sums: LossSums) -> None:
        """Count a batch in. Never waits for the device."""
        scalars = torch.stack([sums.ar_sum, sums.diffusion_sum, sums.ar_count, sums.diffusion_count]).double()
        self.parts += torch.cat([scalars.detach(), sums.draft_hits_K.double(), sums.draft_count_K.double()])

    def means(self, parts: Tensor | None = None) -> LossMeans:
        """Means over all labels. Waits for the device.

        parts  the sum of the `parts` of all workers; by default the parts of this worker alone
        """
        totals = (self.parts if parts is None else parts).tolist()
        ar_sum, diffusion_sum, ar_count, diffusion_count, *drafts = totals
        block_len = len(drafts) // 2
        return LossMeans(
            ar_loss=_share(ar_sum, ar_count),
            diffusion_loss=_share(diffusion_sum, diffusion_count),
            draft_accuracy_K=[_share(hits, count) for hits, count in zip(drafts[:block_len], drafts[block_len:])],
        )


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
    """Cross-entropy in nats, fp32, summed over labels; and whether the likeliest token is the label [N].

    weight_N      weight of each label; `None`: 1
    teacher_NE    hidden states whose distribution replaces the share `distillation` of the label
    before_N      tokens before the labels; `link` adds logits for them
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
        likely_NV = torch.where(
            teacher_NV > 0, logits_NV, 0.0
        )  # the mask token has probability 0 and logit minus infinity
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
    logits_at_once: int | None = None,
) -> LossSums:
    """Cross-entropy in nats, summed over labels, and draft accuracy. Never waits for the device.

    block_len     length of the longest block
    chunk_loss    the function of that name, or a compiled form of it
    link          the model's link, if it has one: the diffusion half then knows the token before each label
    clean_hidden  maps this worker's hidden states of the clean half to the hidden states of whole rows
    logits_at_once  logits held at a time; `None` chooses by device
    """
    S = batch.ar_target_BS.shape[1]
    at_once = logits_at_once or (LOGITS_AT_ONCE_CUDA if hidden_BLE.is_cuda else LOGITS_AT_ONCE)
    ar_sum = hidden_BLE.new_zeros((), dtype=torch.float32)
    if not batch.frozen:
        ar_sum, _ = _cross_entropy(head, batch.ar_target_BS, chunk_loss, at_once, hidden_BLE[:, :S])
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
            head, batch.diffusion_target_BM, chunk_loss, at_once, hidden_BLE[:, S:], batch.diffusion_weight_BM,
            teacher_BME, batch.before_BM if link else None, batch.distillation, link,
        )  # fmt: skip
        offset_N = batch.layout[:, S:].offset.flatten()
        hits_K.index_add_(0, offset_N, hit_N.float())
        count_K.index_add_(0, offset_N, (target_N != IGNORED).float())
    return LossSums(ar_sum, diffusion_sum, ar_count, diffusion_count, hits_K, count_K)


def label_counts(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Number of labels of the AR half and of the diffusion half, known before any forward.

    The sum of the weights replaces the number of labels in a weighted diffusion half.
    """
    ar_count = (batch.ar_target_BS != IGNORED).sum()
    if batch.diffusion_target_BM is None:
        return ar_count, torch.zeros_like(ar_count)
    if batch.diffusion_total is not None:
        return ar_count, batch.diffusion_total
    return ar_count, (batch.diffusion_target_BM != IGNORED).sum()


def dual_mode_loss(sums: LossSums, alpha: float, ar_count: Tensor, diffusion_count: Tensor) -> Tensor:
    """Weighted loss of both halves (TiDAR, equation 3); the AR loss alone if no token is masked.

    ar_count, diffusion_count  counts of the whole train step, over all workers
    """
    ar_mean, diffusion_mean = _mean(sums.ar_sum, ar_count), _mean(sums.diffusion_sum, diffusion_count)
    return torch.where(diffusion_count > 0, (alpha * ar_mean + diffusion_mean) / (1 + alpha), ar_mean)


def _share(total: float, count: float) -> float | None:
    return total / count if count else None


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / torch.where(count > 0, count, 1).to(total.dtype)


def _cross_entropy(
    head: Head,
    target_BS: Tensor,
    of_chunk: ChunkLoss,
    logits_at_once: int,
    hidden_BSE: Tensor,
    weight_BS: Tensor | None = None,
    teacher_BSE: Tensor | None = None,
    before_BS: Tensor | None = None,
    distillation: float = 0.0,
    link: Link = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and whether each label was the likeliest token [B * S].

    Logits exist for one chunk of tokens at a time: with several chunks, each is computed again in the backward pass.
    Tokens without a label are included, so that shapes do not depend on the content of rows.
    """
    hidden_NE, target_N = hidden_BSE.flatten(0, 1), target_BS.flatten()
    weight_N = None if weight_BS is None else weight_BS.flatten()
    teacher_NE = None if teacher_BSE is None else teacher_BSE.flatten(0, 1)
    before_N = None if before_BS is None else before_BS.flatten()
    with torch.no_grad():
        logits = head(hidden_NE[:1]).shape[-1] * (1 + (teacher_NE is not None) + (before_N is not None))
    at_once = max(1, logits_at_once // logits)
    if len(target_N) <= at_once:
        return of_chunk(head, hidden_NE, target_N, weight_N, teacher_NE, before_N, distillation, link)
    chunks = -(-len(target_N) // at_once)
    chunk_len = -(-len(target_N) // chunks)  # as even as possible

    def chunked(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * chunks if x is None else x.split(chunk_len)

    sums, hits = zip(
        *(
            checkpoint(of_chunk, head, *chunk, distillation, link, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*map(chunked, (hidden_NE, target_N, weight_N, teacher_NE, before_N)))
        )
    )
    return torch.stack(sums).sum(), torch.cat(hits)
