"""Triton kernels between the matrix products of a forward, each in one pass over memory.

The kernels are the norm with its residual, then head norm, rotation and cache write, and the gate of the feed-forward
network. Numbers are rounded where plain torch rounds them, so that a decode step with kernels follows a step without.

Shape letters: B sequences, R query tokens of a forward (the C clean ones first), H query heads, G key heads,
D head width, P pages, W features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rms_norm", "rotate_and_store", "silu_mul"]

TILE_R = 8
"""Query tokens of one head that a program rotates."""
TILE_W = 1024
"""Features of the gate that a program computes."""


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes `reference.add_rms_norm`."""
    x = x.contiguous()
    total = x if residual is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    width = x.shape[-1]
    tile = triton.next_power_of_2(width)
    _norm_kernel[(x.numel() // width,)](
        x, x if residual is None else residual.contiguous(), weight, total, normed, eps,
        WIDTH=width, TILE=tile, ADD=residual is not None, num_warps=max(1, min(16, tile // 512)),
    )  # fmt: skip
    return normed, total


def rotate_and_store(
    qkv_BRW: Tensor,
    norm_weight_ND: Tensor | None,
    cos_BRD: Tensor,
    sin_BRD: Tensor,
    kv_pages: Tensor,
    write_slot_BC: Tensor,
    *,
    eps: float,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `reference.rotate_and_store`. The values are a view of qkv."""
    batch, rows, width = qkv_BRW.shape
    page_len, _, kv_heads, size = kv_pages.shape[1:]
    clean_len = write_slot_BC.shape[1]
    assert width == (heads + 2 * kv_heads) * size, f"{width} features, {heads} + 2 * {kv_heads} heads of {size}"
    assert cos_BRD.shape == sin_BRD.shape == (batch, rows, size), f"rotation of {tuple(cos_BRD.shape)}"
    qkv_BRW, write_slot_BC = qkv_BRW.contiguous(), write_slot_BC.contiguous()
    q_BRHD = qkv_BRW.new_empty((batch, rows, heads, size))
    k_BRGD = qkv_BRW.new_empty((batch, rows, kv_heads, size))
    _rotate_kernel[(triton.cdiv(batch * rows, TILE_R), heads + 2 * kv_heads)](
        qkv_BRW, qkv_BRW if norm_weight_ND is None else norm_weight_ND,
        cos_BRD.contiguous(), sin_BRD.contiguous(), kv_pages, write_slot_BC, q_BRHD, k_BRGD,
        batch * rows, rows, clean_len, eps, *kv_pages.stride()[:4],
        HEADS=heads, KV_HEADS=kv_heads, HEAD=size, TILE_H=triton.next_power_of_2(size // 2), PAGE_LEN=page_len,
        TILE_R=TILE_R, NORM=norm_weight_ND is not None, num_warps=4 if size > 64 else 1,
    )  # fmt: skip
    v_BRGD = qkv_BRW[..., (heads + kv_heads) * size :].unflatten(-1, (kv_heads, size))
    return q_BRHD, k_BRGD, v_BRGD


def silu_mul(gate_up: Tensor) -> Tensor:
    """Computes `reference.silu_mul`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    gated = gate_up.new_empty((*gate_up.shape[:-1], width))
    tile = min(TILE_W, triton.next_power_of_2(width))
    _silu_kernel[(gated.numel() // width, triton.cdiv(width, tile))](gate_up, gated, WIDTH=width, TILE=tile)
    return gated


@triton.jit
def _norm_kernel(
    x, residual, weight, total, normed, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Norm of one query token."""
    w = tl.arange(0, TILE)
    real = w < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + w
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=real)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    factor = tl.load(weight + w, mask=real, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    tl.store(normed + at, (value * scale * factor).to(x.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["all_rows", "rows", "clean_len"])
def _rotate_kernel(
    qkv, norm, cos, sin, pages, write_slot, q_out, k_out,
    all_rows, rows, clean_len, eps, page_p, page_t, page_kind, page_g,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE_H: tl.constexpr, PAGE_LEN: tl.constexpr,
    TILE_R: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rotation of TILE_R query tokens of one head of q, k or v, as two halves."""
    head = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    d = tl.arange(0, TILE_H)
    half = d < HEAD // 2
    there = (i < all_rows)[:, None] & half[None, :]
    source = (i * (HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD + d[None, :]
    low = tl.load(qkv + source, mask=there, other=0.0).to(tl.float32)
    high = tl.load(qkv + source + HEAD // 2, mask=there, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD + eps)[:, None]
            low_weight = tl.load(norm + head * HEAD + d, mask=half, other=0.0).to(tl.float32)[None, :]
            high_weight = tl.load(norm + head * HEAD + HEAD // 2 + d, mask=half, other=0.0).to(tl.float32)[None, :]
            low, high = _round(low * scale * low_weight, qkv), _round(high * scale * high_weight, qkv)
        turn = i[:, None] * HEAD + d[None, :]
        cos_low = tl.load(cos + turn, mask=there, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + turn, mask=there, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + turn + HEAD // 2, mask=there, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + turn + HEAD // 2, mask=there, other=0.0).to(tl.float32)
        turned = _round(low * cos_low, qkv) - _round(high * sin_low, qkv)
        high = _round(high * cos_high, qkv) + _round(low * sin_high, qkv)
        low = turned
    new_low, new_high = low.to(qkv.dtype.element_ty), high.to(qkv.dtype.element_ty)
    if head < HEADS:
        q_at = q_out + (i * HEADS + head)[:, None] * HEAD + d[None, :]
        tl.store(q_at, new_low, mask=there)
        tl.store(q_at + HEAD // 2, new_high, mask=there)
    else:
        if head < HEADS + KV_HEADS:
            k_at = k_out + (i * KV_HEADS + head - HEADS)[:, None] * HEAD + d[None, :]
            tl.store(k_at, new_low, mask=there)
            tl.store(k_at + HEAD // 2, new_high, mask=there)
        clean = (i < all_rows) & (i % rows < clean_len)
        slot = tl.load(write_slot + i // rows * clean_len + i % rows, mask=clean, other=0).to(tl.int64)
        kind, kv_head = (head - HEADS) // KV_HEADS, (head - HEADS) % KV_HEADS
        place = slot // PAGE_LEN * page_p + slot % PAGE_LEN * page_t + kind * page_kind + kv_head * page_g
        page_at = pages + place[:, None] + d[None, :]
        tl.store(page_at, new_low, mask=clean[:, None] & half[None, :])
        tl.store(page_at + HEAD // 2, new_high, mask=clean[:, None] & half[None, :])


@triton.jit
def _round(x, like):
    """x rounded to the dtype that `like` points at."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _silu_kernel(gate_up, gated, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Gate of TILE features of one query token."""
    row, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = w < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + w, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + w, mask=real, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(gated.dtype.element_ty).to(tl.float32)
    tl.store(gated + row * WIDTH + w, (opened * up).to(gated.dtype.element_ty), mask=real)
