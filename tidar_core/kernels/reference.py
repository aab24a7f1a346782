"""Kernels in plain torch.

What must each kernel compute?

Machines without kernels run these functions, and the kernels are tested against them.

Shape letters: B sequences, R query tokens of a forward (the C clean ones first), H query heads, G key heads,
D head width, P pages, N pages in a sequence's table, T tokens those pages hold, W features.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Gathering", "add_rms_norm", "paged_attention", "rotate_and_store", "silu_mul"]


def paged_attention(
    q_BRHD: Tensor,
    k_BRGD: Tensor,
    v_BRGD: Tensor,
    kv_pages: Tensor,
    page_table_BN: Tensor,
    prefix_len_B: Tensor,
    own_visible_RR: Tensor,
) -> Tensor:
    """Attention values [B, R, H, D] of the query tokens of one forward.

    Every query token sees the whole prefix of its sequence, and the query tokens that the pattern shows it.

    k_BRGD, v_BRGD  keys and values of this forward's query tokens, each serving a run of H / G query heads
    kv_pages        one layer of the cache [P, page_len, 2, G, D]: keys at 0, values at 1; nothing in it may be nan
    page_table_BN   pages of each sequence in order; any valid page past the prefix, whose tokens are ignored
    prefix_len_B    tokens of the prefix, 0..N * page_len
    own_visible_RR  True where a query token sees another; every query token sees itself
    """
    return Gathering(page_table_BN, prefix_len_B, own_visible_RR, kv_pages.shape[1])(q_BRHD, k_BRGD, v_BRGD, kv_pages)


class Gathering:
    """`paged_attention` for all layers of a forward; everything that all layers share is made once.

    Query heads that share a key head become further queries M of it. On a CPU this is a quarter faster than
    `enable_gqa`, except for the single query token of the autoregressive mode.
    """

    def __init__(self, page_table_BN: Tensor, prefix_len_B: Tensor, own_visible_RR: Tensor, page_len: int) -> None:
        """Takes the arguments of `paged_attention`."""
        self._batch, pages = page_table_BN.shape
        self._tokens, self._rows = pages * page_len, len(own_visible_RR)
        room = -(-self._rows // page_len)
        self._page_M = F.pad(page_table_BN, (0, room)).flatten()
        """Pages of each sequence, then any pages: the forward's own keys and values are written over their copies."""
        self._dark_BT = torch.arange(self._tokens, device=prefix_len_B.device) >= prefix_len_B[:, None]
        self._dark_RR = ~own_visible_RR
        self._bias_B1MK: Tensor | None = None

    def __call__(self, q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor, kv_pages: Tensor) -> Tensor:
        """Values [B, R, H, D]."""
        share = q_BRHD.shape[2] // k_BRGD.shape[2]
        folds = share > 1 and self._rows > 1
        if self._bias_B1MK is None:
            self._prepare(share if folds else 1, q_BRHD.dtype, kv_pages)
        torch.index_select(kv_pages, 0, self._page_M, out=self._copy)
        self._own_k_BRGD.copy_(k_BRGD)
        self._own_v_BRGD.copy_(v_BRGD)
        k, v, bias = self._k_BGKD, self._v_BGKD, self._bias_B1MK
        if not folds:
            q = q_BRHD.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=share > 1).transpose(1, 2)
        B, R, H, D = q_BRHD.shape
        q = q_BRHD.unflatten(2, (-1, share)).permute(0, 2, 3, 1, 4).reshape(B, -1, share * R, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.view(B, -1, share, R, D).permute(0, 3, 1, 2, 4).reshape(B, R, H, D)

    def _prepare(self, share: int, dtype: torch.dtype, kv_pages: Tensor) -> None:
        """Make what every layer uses: the bias that hides keys, and room for the keys and values of one layer."""
        dark_B1MT = self._dark_BT[:, None, None].expand(-1, -1, share * self._rows, -1)
        dark_B1MR = self._dark_RR.repeat(share, 1).expand(self._batch, 1, -1, -1)
        dark_B1MK = torch.cat([dark_B1MT, dark_B1MR], -1)
        zeros = torch.zeros(dark_B1MK.shape, dtype=dtype, device=dark_B1MK.device)
        self._bias_B1MK = zeros.masked_fill_(dark_B1MK, float("-inf"))
        self._copy = kv_pages.new_empty((len(self._page_M), *kv_pages.shape[1:]))
        both_BK2GD = self._copy.view(self._batch, -1, *kv_pages.shape[2:])[:, : self._tokens + self._rows]
        k_BKGD, v_BKGD = both_BK2GD.unbind(2)
        self._own_k_BRGD, self._own_v_BRGD = k_BKGD[:, self._tokens :], v_BKGD[:, self._tokens :]
        self._k_BGKD, self._v_BGKD = k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed sum of x and residual, and the sum itself, which is the next residual.

    The sum is divided by its root mean square and scaled by `weight`.

    x, residual  [.., W]; without a residual the sum is x
    eps          added to the mean square
    """
    total = x if residual is None else x + residual
    return _rms_norm(total, weight, eps), total


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
    """Queries [B, R, H, D], keys and values [B, R, G, D] of a forward's query tokens.

    Queries and keys are normed per head, if there are weights, and rotated. Keys and values of the clean tokens are
    written to the cache.

    qkv_BRW           projections, W = (H + 2 G) * D; overwritten, so not to be used afterwards
    norm_weight_ND    weights of the N = H + G heads of queries and keys, in the dtype of qkv
    cos_BRD, sin_BRD  rotation of each query token's position, both halves, in the dtype of qkv
    kv_pages          one layer of the cache [P, page_len, 2, G, D], written in place
    write_slot_BC     page * page_len + offset of the C leading query tokens, which are clean; others are not written
    """
    kv_heads, size = kv_pages.shape[-2:]
    row_BRHD = qkv_BRW.unflatten(-1, (-1, size))
    turned = row_BRHD[:, :, : heads + kv_heads]
    x = turned
    if norm_weight_ND is not None:
        x = _rms_norm(x, norm_weight_ND, eps)
    first, second = x.chunk(2, -1)
    swapped = torch.cat([-second, first], -1)
    torch.addcmul(x * cos_BRD[:, :, None], swapped, sin_BRD[:, :, None], out=turned)
    q_BRHD, kv_BRHD = row_BRHD[:, :, :heads], row_BRHD[:, :, heads:]
    clean_BCHD = kv_BRHD[:, : write_slot_BC.shape[1]]
    kv_pages.view(-1, *kv_pages.shape[2:])[write_slot_BC] = clean_BCHD.unflatten(2, (2, kv_heads))
    return q_BRHD, kv_BRHD[:, :, :kv_heads], kv_BRHD[:, :, kv_heads:]


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [.., W].

    gate_up  [.., 2 W], gate then up
    """
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension, in fp32.

    With as few tokens as in a decode step, a CPU needs half to two thirds of the time of `F.rms_norm`, which has
    more operations.
    """
    size = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    root_mean_square = torch.hypot(norm, _scalar((size * eps) ** 0.5)).mul_(size**-0.5)
    return (x / root_mean_square).mul_(weight).to(x.dtype)


@cache
def _scalar(value: float) -> Tensor:
    """Scalar tensor on the CPU: a launch on another device takes it by value, so a captured graph keeps no address."""
    return torch.tensor(value)
