"""Norm, gate and rotation of a train step in C, with their gradients.

How does a frozen layer pass gradients without a dozen passes over each tensor?

Between the products of a layer, plain torch reads and writes each tensor several times, and again in the backward pass.
These functions read it once or twice in each. They serve training alone, and the norm only where its weight is frozen.

Shape letters: B rows, L tokens, H heads, D head width, W features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_core.kernels import on_cpu
from tidar_core.kernels.compiled import library, needed_library

__all__ = ["rms_norm", "rotated", "silu_mul", "suits"]


def suits(*tensors: Tensor) -> bool:
    """Whether these functions take such tensors here: in training on a CPU that has C kernels."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    on_cpus = all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)
    return on_cpus and dtype in on_cpu.DTYPES and library() is not None


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """Normed x [.., W]; no gradient reaches the weight."""
    return _Norm.apply(x, weight_W, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [.., W] of gate, then up."""
    return _Gate.apply(gate_up)


def rotated(x_BLHD: Tensor, cos_BL1D: Tensor, sin_BL1D: Tensor) -> Tensor:
    """Heads turned by the angles of their tokens; both halves of an angle are equal, and have no gradient."""
    return _Rotation.apply(x_BLHD, cos_BL1D, sin_BL1D)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, ctx.eps = x.contiguous(), eps
        ctx.save_for_backward(x, weight)
        return on_cpu.add_rms_norm(x, None, weight, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        out, grad, width = torch.empty_like(x), grad.contiguous(), x.shape[-1]
        needed_library().rms_norm_gradient(
            x.data_ptr(), weight.data_ptr(), grad.data_ptr(), ctx.eps, x.numel() // width, width,
            x.dtype == on_cpu.HALF, out.data_ptr(),
        )  # fmt: skip
        return out, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return on_cpu.silu_mul(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (gate_up,) = ctx.saved_tensors
        out, grad, width = torch.empty_like(gate_up), grad.contiguous(), grad.shape[-1]
        needed_library().silu_mul_gradient(
            gate_up.data_ptr(), grad.data_ptr(), grad.numel() // width, width, grad.dtype == on_cpu.HALF, out.data_ptr()
        )
        return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x_BLHD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    B, L, H, D = x_BLHD.shape
    tokens_apart = x_BLHD.stride(1)
    if x_BLHD.stride()[2:] != (D, 1) or (B > 1 and x_BLHD.stride(0) != L * tokens_apart):
        x_BLHD, tokens_apart = x_BLHD.contiguous(), H * D
    out = torch.empty((B, L, H, D), dtype=x_BLHD.dtype)
    needed_library().rotate(
        x_BLHD.data_ptr(), tokens_apart, cos.data_ptr(), sin.data_ptr(), B * L, H, D, sign,
        x_BLHD.dtype == on_cpu.HALF, out.data_ptr(),
    )  # fmt: skip
    return out
