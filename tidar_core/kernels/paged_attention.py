"""Triton kernel for attention over cache pages and the forward's own query tokens, without a copy.

Flash decoding: the prefix is cut into splits. One program reads a split once for all queries that share it: query
tokens of a sequence times query heads of a key-value head. The forward's own query tokens are one more split. A second
kernel merges the splits by their log-sum-exp. If one split keeps the device busy, its program also reads the own
query tokens and writes the result itself.

Nothing about the launch depends on a length. The prefix lengths stay on the device, each program takes its share of the
true length, and a program whose share is empty exits. So a captured graph serves every length that its page table
holds.

Shape letters: B sequences, R query tokens, H query heads, G key-value heads, D head width,
N pages in a sequence's table. In the kernels: M query tokens times the H / G query heads of a key-value head, n keys,
d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiling", "choose_tiling", "gathering", "paged_attention"]

EMPTY = tl.constexpr(-1e30)
"""Log-sum-exp of no keys: finite, so that differences of it are numbers."""
LOG2_E = 1.4426950408889634
MOST_SPLITS = 64
"""Limit of the splits, which bounds the tile of the merge."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Division of one call into programs."""

    tile_m: int
    """Queries of a program: query tokens of the forward times query heads of a key-value head."""
    tile_n: int
    """Keys that a program reads at a time."""
    splits: int
    """Parts of the prefix, one for each program. With 1, one program reads prefix and own query tokens, and nothing is
    merged."""
    warps: int
    stages: int
    """Tiles of keys in flight."""


@cache
def choose_tiling(
    *, query_rows: int, pairs: int, max_context: int, head_size: int, item_bytes: int, processors: int
) -> Tiling:
    """A tiling for the static facts of a call.

    query_rows   queries of a key-value head, R * H / G
    pairs        B * G: programs that share no key
    max_context  most tokens of a prefix
    item_bytes   bytes of one element of q, k and v
    processors   multiprocessors of the device
    """
    exact, wide = item_bytes > 2, head_size > 128
    most_m, tile_n = (32, 16) if exact else (64, 32) if wide else (128, 64)
    tile_m = max(16, min(triton.next_power_of_2(query_rows), most_m))
    # The last tile may be mostly padding: tiles of half the height then waste less than their second reading costs.
    if tile_m == 128 and 128 * triton.cdiv(query_rows, 128) > 1.15 * 64 * triton.cdiv(query_rows, 64):
        tile_m = 64
    warps = 8 if tile_m == 128 or wide else 4
    stages = 2 if exact or wide else 4 if tile_m <= 32 else 3
    slots = processors * (1 if warps == 8 else 2)  # limited by registers and shared memory
    programs, tiles = pairs * triton.cdiv(query_rows, tile_m), triton.cdiv(max_context, tile_n)

    def rounds(splits: int) -> int:
        """Tiles read one after the other: a program's start counts as two, a merge as two, a part by its height."""
        waves = triton.cdiv(programs * splits, slots)
        if splits == 1:
            return waves * (tiles + 2)
        return waves * (triton.cdiv(tiles, splits) + 2 + tile_m // 32) + 2

    return Tiling(tile_m, tile_n, min(range(1, min(max(tiles, 1), MOST_SPLITS) + 1), key=rounds), warps, stages)


def paged_attention(
    q_BRHD: Tensor,
    k_BRGD: Tensor,
    v_BRGD: Tensor,
    kv_pages: Tensor,
    page_table_BN: Tensor,
    prefix_len_B: Tensor,
    own_visible_RR: Tensor,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """Values [B, R, H, D]; computes `reference.paged_attention`. Query tokens that see nothing get zeros.

    tiling  chosen from the shapes if not given
    """
    batch, rows, heads, head_size = q_BRHD.shape
    kv_heads = k_BRGD.shape[2]
    page_len = kv_pages.shape[1]
    _check(q_BRHD, k_BRGD, v_BRGD, kv_pages, page_table_BN, own_visible_RR)
    query_rows = rows * heads // kv_heads
    tiling = tiling or choose_tiling(
        query_rows=query_rows,
        pairs=batch * kv_heads,
        max_context=page_table_BN.shape[1] * page_len,
        head_size=head_size,
        item_bytes=q_BRHD.element_size(),
        processors=_processors(q_BRHD.device),
    )
    parts = tiling.splits + 1 if tiling.splits > 1 else 1
    out_BRHD = torch.empty((batch, rows, heads, head_size), dtype=q_BRHD.dtype, device=q_BRHD.device)
    partial, lse = out_BRHD, out_BRHD  # placeholders: with one part, neither is written
    if parts > 1:
        lse = torch.empty((batch * kv_heads, parts, query_rows), dtype=torch.float32, device=q_BRHD.device)
        partial = torch.empty((*lse.shape, head_size), dtype=torch.float32, device=q_BRHD.device)
    tile_d = max(16, triton.next_power_of_2(head_size))
    fixed = {"GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "HEAD": head_size, "TILE_D": tile_d}
    _gather_kernel[(triton.cdiv(query_rows, tiling.tile_m), batch * kv_heads, parts)](
        q_BRHD, k_BRGD, v_BRGD, kv_pages, page_table_BN, prefix_len_B, own_visible_RR.view(torch.uint8),
        out_BRHD, partial, lse, rows, tiling.splits, head_size**-0.5 * LOG2_E,
        *q_BRHD.stride()[:3], *k_BRGD.stride()[:3], *v_BRGD.stride()[:3], *kv_pages.stride()[:4],
        page_table_BN.stride(0),
        **fixed, PAGE_LEN=page_len, TILE_M=tiling.tile_m, TILE_N=tiling.tile_n, SPLIT=parts > 1,
        PRECISION="ieee" if q_BRHD.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    if parts > 1:
        tile_s = triton.next_power_of_2(parts)
        _merge_kernel[(query_rows, batch * kv_heads)](
            partial, lse, out_BRHD, rows, parts, **fixed, TILE_S=tile_s,
            num_warps=max(1, min(8, tile_s * tile_d // 1024)),
        )  # fmt: skip
    return out_BRHD


def gathering(
    page_table_BN: Tensor, prefix_len_B: Tensor, own_visible_RR: Tensor, page_len: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Computes `reference.Gathering`."""

    def gather(q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor, kv_pages: Tensor) -> Tensor:
        return paged_attention(q_BRHD, k_BRGD, v_BRGD, kv_pages, page_table_BN, prefix_len_B, own_visible_RR)

    return gather


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(q: Tensor, k: Tensor, v: Tensor, kv_pages: Tensor, page_table_BN: Tensor, own_visible_RR: Tensor) -> None:
    rows, page_len = q.shape[1], kv_pages.shape[1]
    assert page_len & (page_len - 1) == 0, f"{page_len} tokens a page; a power of two is needed"
    assert q.dtype == k.dtype == v.dtype == kv_pages.dtype, f"{q.dtype} queries, {kv_pages.dtype} pages"
    assert all(x.stride(-1) == 1 for x in (q, k, v, kv_pages, page_table_BN)), "the last axis must be dense"
    assert own_visible_RR.shape == (rows, rows), f"{rows} query tokens, pattern of {tuple(own_visible_RR.shape)}"
    assert own_visible_RR.is_contiguous(), "the pattern must be dense"


@triton.jit(do_not_specialize=["rows", "splits", "table_stride"])
def _gather_kernel(
    q, k, v, pages, page_table, prefix_len, own_visible, out, partial, lse,
    rows, splits, scale,
    q_b, q_r, q_h, k_b, k_r, k_g, v_b, v_r, v_g, page_p, page_t, page_kind, page_g, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE_D: tl.constexpr, PAGE_LEN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one split. Tiles come first in the grid, so that tiles of a split share its keys in
    L2."""
    pair, split = tl.program_id(1), tl.program_id(2)
    b, g = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    row, head = m // GROUP, g * GROUP + m % GROUP
    real = m < rows * GROUP
    at = (pair.to(tl.int64) * (splits + 1) + split) * rows * GROUP + m  # in partial and lse

    length = tl.load(prefix_len + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), TILE_N) * TILE_N
    start = split * share
    end = tl.minimum(start + share, length)
    own_end = rows
    if SPLIT:
        if (split < splits) & (start >= length):
            tl.store(lse + at, tl.full([TILE_M], EMPTY, tl.float32), mask=real)
            return
        own_end = tl.where(split == splits, rows, 0)

    d = tl.arange(0, TILE_D)
    d_real = d < HEAD
    whole = real[:, None] & d_real[None, :]
    query = tl.load(q + b * q_b + (row * q_r + head * q_h)[:, None] + d[None, :], mask=whole, other=0.0)
    top = tl.full([TILE_M], EMPTY, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    gathered = tl.zeros([TILE_M, TILE_D], tl.float32)
    table = page_table + b * table_stride
    n = start + tl.arange(0, TILE_N)
    page = tl.load(table + n // PAGE_LEN, mask=n < end, other=0)
    for _ in range(start, end, TILE_N):
        inside = n < end
        place = page.to(tl.int64) * page_p + (n % PAGE_LEN) * page_t + g * page_g
        slot = pages + place[:, None] + d[None, :]
        n += TILE_N  # page ids are read a tile ahead, so that loads of keys and values do not wait for the table
        page = tl.load(table + n // PAGE_LEN, mask=n < end, other=0)
        there = inside[:, None] & d_real[None, :]
        key = tl.load(slot, mask=there, other=0.0)
        value = tl.load(slot + page_kind, mask=there, other=0.0)
        gathered, top, total = _absorb(query, key, value, inside[None, :], scale, gathered, top, total, PRECISION)
    gathered, top, total = _absorb_own(
        query, k + b * k_b + g * k_g, v + b * v_b + g * v_g, k_r, v_r, own_visible, row, real, rows, own_end,
        d, d_real, scale, gathered, top, total, TILE_N, PRECISION,
    )  # fmt: skip
    gathered = gathered / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        log_total = tl.log2(tl.where(total > 0, total, 1.0))
        tl.store(lse + at, tl.where(total > 0, top + log_total, EMPTY), mask=real)
        tl.store(partial + at[:, None] * HEAD + d[None, :], gathered, mask=whole & (total > 0)[:, None])
    else:
        place = ((b * rows + row) * (KV_HEADS * GROUP) + head) * HEAD
        tl.store(out + place[:, None] + d[None, :], gathered.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _absorb_own(
    query, k, v, k_r, v_r, own_visible, row, real, rows, end, d, d_real, scale, gathered, top, total,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax over the forward's own query tokens, up to `end`.

    Skips tiles that no query sees. In a large draft these are most tiles: other groups' blocks.
    """
    for first in range(0, end, TILE_N):
        n = first + tl.arange(0, TILE_N)
        inside = n < rows
        lit = real[:, None] & inside[None, :]
        seen = tl.load(own_visible + row[:, None] * rows + n[None, :], mask=lit, other=0).to(tl.int32)
        if tl.max(seen) > 0:
            there = inside[:, None] & d_real[None, :]
            key = tl.load(k + n[:, None] * k_r + d[None, :], mask=there, other=0.0)
            value = tl.load(v + n[:, None] * v_r + d[None, :], mask=there, other=0.0)
            gathered, top, total = _absorb(query, key, value, seen > 0, scale, gathered, top, total, PRECISION)
    return gathered, top, total


@triton.jit
def _absorb(query, key, value, seen, scale, gathered, top, total, PRECISION: tl.constexpr):
    """Continue the running softmax over one more tile of keys.

    `top` starts finite, so that unseen keys have the weight 0 and not nan.
    """
    score = tl.where(seen, tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    fade = tl.exp2(top - new_top)
    gathered = tl.dot(weight.to(value.dtype), value, gathered * fade[:, None], input_precision=PRECISION)
    return gathered, new_top, total * fade + tl.sum(weight, 1)


@triton.jit(do_not_specialize=["rows", "parts"])
def _merge_kernel(
    partial, lse, out, rows, parts,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE_D: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """Merge of one query: its splits, weighted by the exponentials of their log-sum-exps."""
    m, pair = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, TILE_S), tl.arange(0, TILE_D)
    at = (pair.to(tl.int64) * parts + s) * rows * GROUP + m
    part_lse = tl.load(lse + at, mask=s < parts, other=EMPTY)
    filled = part_lse > EMPTY
    weight = tl.where(filled, tl.exp2(part_lse - tl.max(part_lse, 0)), 0.0)
    there = filled[:, None] & (d < HEAD)[None, :]
    part = tl.load(partial + at[:, None] * HEAD + d[None, :], mask=there, other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    b, g = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    place = ((b * rows + m // GROUP) * (KV_HEADS * GROUP) + g * GROUP + m % GROUP) * HEAD
    tl.store(out + place + d, merged.to(out.dtype.element_ty), mask=d < HEAD)
