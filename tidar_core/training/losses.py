"""Losses of both halves of a batch, as sums that any number of workers can add up.

    L = [ alpha * mean CE(AR) + mean CE(diffusion) ] / (1 + alpha)          (TiDAR, equation 3)

Each mean runs over all labels of the train step, on all workers; so this module returns sums and counts, not means.

A recipe may weight the labels of the diffusion half; its mean then divides by the sum of the weights. Weights that
follow from the losses themselves (D-PACE) are not part of this sum, which all workers know before any forward.

Shape letters: B rows, S tokens of a row, M tokens of its mask half, N labelled tokens, E embedding, V vocabulary,
K block length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tidar_core.kernels import losses_on_cpu
from tidar_core.training.distillation import WHOLE_VOCABULARY, blended
from tidar_core.training.dpace import dpace_weights
from tidar_core.training.dual_mode import IGNORED, TrainBatch
from tidar_core.transformer.layout import LENGTH_STEP

__all__ = ["LossMeans", "LossSums", "LossTotals", "chunk_loss", "dual_mode_loss", "label_counts", "loss_sums"]

LOGITS_AT_ONCE = 2**27
"""Logits held at a time. Without a limit, a row of 2 x 4,096 tokens would need 5 GB with a vocabulary of 151,936."""
LOGITS_AT_ONCE_CUDA = 2**29
"""Logits held at a time on an accelerator: 2 GB in fp32. So 32,768 tokens of a vocabulary of 16,384 need no second
pass."""

Head = Callable[[Tensor], Tensor]
Link = Callable[[Tensor, Tensor], Tensor] | None
TokenLosses = tuple[Tensor, Tensor, Tensor]
"""Loss of each label, with gradients; its cross-entropy alone, without; the likeliest token, or whether it is the
label."""
ChunkLoss = Callable[..., TokenLosses]


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the labelled tokens of one batch; the first two carry gradients."""

    ar_sum: Tensor
    diffusion_sum: Tensor
    ar_count: Tensor
    diffusion_count: Tensor
    """Number of labels, or the sum of their weights, those of D-PACE included."""
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
    teacher_NE: Tensor | None = None,
    before_N: Tensor | None = None,
    unlinked: Tensor | None = None,
    distillation: float = 0.0,
    link: Link = None,
) -> TokenLosses:
    """Loss of each label, fp32, in nats.

    teacher_NE    hidden states whose distribution replaces the share `distillation` of the label
    before_N      tokens before the labels; `link` adds logits for them
    unlinked      weight of the loss without the link beside the loss with it, a scalar; `None`: 0
    """
    labelled_N = target_N != IGNORED
    label_N = torch.where(labelled_N, target_N, 0)
    logits_NV, mask_id = head(hidden_NE), getattr(head, "mask_id", None)
    link_NV = None if link is None or before_N is None else link(before_N, hidden_NE)
    if link_NV is not None and unlinked is None:
        logits_NV, link_NV = logits_NV + link_NV, None
    teacher_NV = None if teacher_NE is None else head(teacher_NE.detach()).detach()
    if losses_on_cpu.suits(logits_NV) and (teacher_NV is None or logits_NV.shape[-1] <= WHOLE_VOCABULARY):
        weight = 0.0 if unlinked is None else float(unlinked)
        found = losses_on_cpu.token_losses(logits_NV, link_NV, teacher_NV, label_N, distillation, weight)
    else:
        found = plain_losses(logits_NV, link_NV, teacher_NV, label_N, distillation, unlinked, mask_id)
    loss_N, cross_entropy_N, likeliest_N = found
    return torch.where(labelled_N, loss_N, 0.0), torch.where(labelled_N, cross_entropy_N, 0.0), likeliest_N == target_N


def plain_losses(
    logits_NV: Tensor,
    link_NV: Tensor | None,
    teacher_NV: Tensor | None,
    label_N: Tensor,
    distillation: float,
    unlinked: Tensor | None,
    mask_id: int | None,
) -> TokenLosses:
    """Loss of each label with gradients, its cross-entropy alone without, and the likeliest token.

    On a CPU `tidar_core.kernels.losses_on_cpu` computes the same where it can.

    Arguments are those of `chunk_loss`, with the logits that it computes; `mask_id` is the token whose logit is minus
    infinity.
    """
    blend = None if teacher_NV is None else blended(teacher_NV.float(), label_N[:, None], distillation, mask_id)

    def compared(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token, and its cross-entropy alone."""
        logprob_NV = logits_NV.log_softmax(-1)
        of_label_N = -logprob_NV.gather(-1, label_N[:, None])[:, 0]
        return of_label_N if blend is None else blend.cross_entropy(logprob_NV), of_label_N.detach()

    plain_NV = logits_NV.float()
    linked_NV = plain_NV if link_NV is None else plain_NV + link_NV
    loss_N, cross_entropy_N = compared(linked_NV)
    if unlinked is not None and link_NV is not None:
        loss_N = (loss_N + unlinked * compared(plain_NV)[0]) / (1 + unlinked)
    return loss_N, cross_entropy_N, linked_NV.argmax(-1)


def loss_sums(
    hidden_BLE: Tensor,
    head: Head,
    batch: TrainBatch,
    block_len: int,
    chunk_loss: ChunkLoss = chunk_loss,
    link: Link = None,
    gathered: Callable[[Tensor], Tensor] = lambda part_BM: part_BM,
    logits_at_once: int | None = None,
    ragged: bool = False,
) -> LossSums:
    """Losses in nats, summed over labels, and draft accuracy. Never waits for the device, unless it is `ragged`.

    block_len     length of the longest block
    chunk_loss    the function of that name, or a compiled form of it
    link          the model's link, if it has one: the diffusion half then knows the token before each label
    gathered      maps this worker's part of one half [B, ..] to whole rows, without gradients
    logits_at_once  logits held at a time; `None` chooses by device
    ragged        compute logits only where a label is, so that shapes follow the labels
    """
    S = batch.ar_target_BS.shape[1]
    at_once = logits_at_once or (LOGITS_AT_ONCE_CUDA if hidden_BLE.is_cuda else LOGITS_AT_ONCE)
    ar_sum = hidden_BLE.new_zeros((), dtype=torch.float32)
    if not batch.frozen:
        ar_sum = _token_losses(head, batch.ar_target_BS, chunk_loss, at_once, ragged, hidden_BLE[:, :S])[0].sum()
    ar_count, diffusion_count = label_counts(batch)
    hits_K = torch.zeros(block_len, device=hidden_BLE.device)
    count_K = torch.zeros_like(hits_K)
    diffusion_sum = ar_sum.new_zeros(())
    if batch.diffusion_target_BM is not None:
        hidden_BME, labelled_BM = hidden_BLE[:, S:], batch.diffusion_target_BM != IGNORED
        teacher_BME = None
        if batch.teacher_BM is not None:
            whole_BSE = gathered(hidden_BLE[:, :S].detach())
            teacher_BME = whole_BSE.gather(1, batch.teacher_BM[..., None].expand(-1, -1, whole_BSE.shape[-1]))
        loss_BM, label_loss_BM, hit_BM = _token_losses(
            head, batch.diffusion_target_BM, chunk_loss, at_once, ragged, hidden_BME,
            teacher_BME if batch.distillation else None, batch.before_BM if link else None, batch.unlinked,
            batch.distillation, link,
        )  # fmt: skip
        if batch.consistency and teacher_BME is not None:
            apart_BM = (hidden_BME.float() - teacher_BME.float()).square().mean(-1)
            loss_BM = loss_BM + batch.consistency * torch.where(labelled_BM, apart_BM, 0.0)
        weight_BM = batch.diffusion_weight_BM
        if batch.dpace:
            chained_BM = _dpace_weights(label_loss_BM, batch, block_len, gathered)
            weight_BM = chained_BM if weight_BM is None else weight_BM * chained_BM
            diffusion_count = (weight_BM * labelled_BM).sum(dtype=torch.float64)
        diffusion_sum = (loss_BM if weight_BM is None else loss_BM * weight_BM).sum()
        offset_N = batch.layout[:, S:].offset.flatten()
        hits_K.index_add_(0, offset_N, hit_BM.flatten().float())
        count_K.index_add_(0, offset_N, labelled_BM.flatten().float())
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


def _dpace_weights(
    label_loss_BM: Tensor, batch: TrainBatch, block_len: int, gathered: Callable[[Tensor], Tensor]
) -> Tensor:
    """Weights of this worker's labels: blocks are whole in whole rows alone."""
    assert batch.diffusion_target_BM is not None
    loss_BM, target_BM = gathered(label_loss_BM), gathered(batch.diffusion_target_BM)
    masks = (batch.whole or batch.layout)[:, -target_BM.shape[1] :]
    weight_BM = dpace_weights(loss_BM, target_BM != IGNORED, masks.offset, block_len)
    return weight_BM[:, batch.first_mask : batch.first_mask + label_loss_BM.shape[1]]


def _token_losses(
    head: Head,
    target_BS: Tensor,
    of_chunk: ChunkLoss,
    logits_at_once: int,
    ragged: bool,
    hidden_BSE: Tensor,
    teacher_BSE: Tensor | None = None,
    before_BS: Tensor | None = None,
    *settings: Any,
) -> TokenLosses:
    """`chunk_loss` of all tokens, [B, S] each; 0 for tokens without a label.

    Tokens without a label are computed unless it is `ragged`, so that shapes do not depend on the content of rows.
    """
    facts = [None if x is None else x.flatten(0, 1) for x in (hidden_BSE, target_BS, teacher_BSE, before_BS)]
    if not ragged:
        found = _in_chunks(head, of_chunk, logits_at_once, facts, *settings)
        return tuple(x.view_as(target_BS) for x in found)  # pyrefly: ignore[bad-return]
    labelled = target_BS != IGNORED
    index_N = labelled.flatten().nonzero()[:, 0]
    index_N = F.pad(index_N, (0, -len(index_N) % LENGTH_STEP))  # the first token again, and its results are not read
    found = _in_chunks(head, of_chunk, logits_at_once, [None if x is None else x[index_N] for x in facts], *settings)
    return tuple(x.new_zeros(target_BS.shape).masked_scatter(labelled, x) for x in found)  # pyrefly: ignore[bad-return]


def _in_chunks(
    head: Head, of_chunk: ChunkLoss, logits_at_once: int, facts: Sequence[Tensor | None], *settings: Any
) -> TokenLosses:
    """`chunk_loss` of facts of N tokens: logits exist for one chunk of tokens at a time.

    With several chunks, each is computed again in the backward pass.
    """
    hidden_NE, _, teacher_NE, before_N = facts
    assert hidden_NE is not None
    with torch.no_grad():
        one = head(hidden_NE[:1])
    held = [teacher_NE, before_N]
    if settings and not losses_on_cpu.suits(one):
        held.append(settings[0])  # plain torch also holds what the loss without the link needs
    logits = one.shape[-1] * (1 + sum(x is not None for x in held))
    at_once = max(1, logits_at_once // logits)
    if len(hidden_NE) <= at_once:
        return of_chunk(head, *facts, *settings)
    chunks = -(-len(hidden_NE) // at_once)
    chunk_len = -(-len(hidden_NE) // chunks)  # as even as possible

    def chunked(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * chunks if x is None else x.split(chunk_len)

    found = [
        checkpoint(of_chunk, head, *chunk, *settings, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*map(chunked, facts))
    ]
    loss, label, hit = zip(*found)
    return torch.cat(loss), torch.cat(label), torch.cat(hit)
