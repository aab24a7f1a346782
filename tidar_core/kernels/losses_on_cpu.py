"""Losses of labels in C, with their gradient.

How is the largest tensor of a train step read as seldom as possible?

Logits of a label are one row of the vocabulary's width. Plain torch keeps several rows of this width for each label and
passes over them a dozen times. The kernel reads each row of logits three times and writes its gradient once.

Shape letters: N labels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_core.kernels.compiled import library, needed_library
from tidar_core.kernels.on_cpu import DTYPES, HALF

__all__ = ["suits", "token_losses"]


def suits(logits_NV: Tensor) -> bool:
    """Whether the kernel takes such logits here. torch's compiler cannot look into it, and fuses the plain form."""
    if torch.compiler.is_compiling() or logits_NV.device.type != "cpu" or logits_NV.dtype not in DTYPES:
        return False
    return library() is not None


def token_losses(
    logits_NV: Tensor,
    link_NV: Tensor | None,
    teacher_NV: Tensor | None,
    label_N: Tensor,
    share: float,
    unlinked: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each label in nats, with gradients; its cross-entropy alone, without; the likeliest token.

    All logits have one dtype; losses are fp32.

    link_NV     logits to add; `None`: none
    teacher_NV  logits whose distribution replaces the share `share` of the label, without a gradient; `None`: none
    unlinked    weight of the loss without the link's logits beside the loss with them
    """
    return _Losses.apply(logits_NV, link_NV, teacher_NV, label_N, share, unlinked)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, share, unlinked = given
        tensors: list[Any] = [None if x is None else x.contiguous() for x in tensors]
        logits_NV, *_, label_N = tensors
        assert all(x is None or x.dtype == logits_NV.dtype for x in tensors[:3]), "logits of several dtypes"
        loss_N, cross_entropy_N = logits_NV.new_empty(2, len(logits_NV), dtype=torch.float32)
        likeliest_N, sums_N3 = torch.empty_like(label_N), loss_N.new_empty(len(logits_NV), 3)
        ctx.of = share, unlinked
        _call(needed_library().losses_forward, tensors, ctx.of, loss_N, cross_entropy_N, likeliest_N, sums_N3)
        ctx.save_for_backward(*tensors, sums_N3)
        ctx.mark_non_differentiable(cross_entropy_N, likeliest_N)
        return loss_N, cross_entropy_N, likeliest_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        *tensors, sums_N3 = ctx.saved_tensors
        of_plain = torch.empty_like(tensors[0])
        of_link = None if tensors[1] is None else torch.empty_like(tensors[1])
        _call(needed_library().losses_backward, tensors, ctx.of, grad_N.contiguous(), sums_N3, of_plain, of_link)
        return of_plain, of_link, None, None, None, None


def _call(function: Any, tensors: list[Tensor | None], weights: tuple[float, float], *others: Tensor | None) -> None:
    logits_NV = tensors[0]
    assert logits_NV is not None, "there are logits"
    pointers, rest = ([None if x is None else x.data_ptr() for x in found] for found in (tensors, others))
    function(*pointers, *logits_NV.shape, *weights, logits_NV.dtype == HALF, *rest)
