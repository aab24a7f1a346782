"""What must each kernel compute?

The same functions in plain torch: the path of machines without a kernel, and what the kernels are tested against.

Shape letters: B sequences, R rows of a forward (the C clean ones first), H query heads, G key heads, D head width,
P pages, N pages in a sequence's table, T tokens those pages hold, W features.
"""

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
    """Values [B, R, H, D] gathered for the rows of one forward: every row sees its sequence's whole prefix, and of the
    rows of this forward those that the pattern shows it.

    k_BRGD, v_BRGD  keys and values of this forward's own rows, each serving a run of H / G query heads
    kv_pages        one layer of the cache [P, page_len, 2, G, D]: keys at 0, values at 1; nothing in it may be nan
    page_table_BN   pages of each sequence in order; any valid page past the prefix, whose tokens are not looked at
    prefix_len_B    tokens of the prefix, 0..N * page_len
    own_visible_RR  True where a row sees a row; every row sees one at least, itself
    """
    return Gathering(page_table_BN, prefix_len_B, own_visible_RR, kv_pages.shape[1])(q_BRHD, k_BRGD, v_BRGD, kv_pages)


class Gathering:
    """`paged_attention` for all layers of a forward: what does not change from layer to layer is made once.

    Query heads that share a key head become further rows M of it: on a CPU a quarter faster than `enable_gqa`, but for
    the single row of the autoregressive mode.
    """

    def __init__(self, page_table_BN: Tensor, prefix_len_B: Tensor, own_visible_RR: Tensor, page_len: int) -> None:
        """As `paged_attention` takes them."""
        batch, pages = page_table_BN.shape
        self._page_M = page_table_BN.flatten()
        prefix_BT = torch.arange(pages * page_len, device=prefix_len_B.device) < prefix_len_B[:, None]
        row_len = len(own_visible_RR)
        seen = [prefix_BT[:, None].expand(-1, row_len, -1), own_visible_RR.expand(batch, -1, -1)]
        self._unseen_B1RK = ~torch.cat(seen, -1)[:, None]
        self._bias_B1MK: Tensor | None = None

    def __call__(self, q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor, kv_pages: Tensor) -> Tensor:
        """Values [B, R, H, D]."""
        share = q_BRHD.shape[2] // k_BRGD.shape[2]
        folds = share > 1 and q_BRHD.shape[1] > 1
        if self._bias_B1MK is None:
            zeros = torch.zeros(self._unseen_B1RK.shape, dtype=q_BRHD.dtype, device=q_BRHD.device)
            bias_B1RK = zeros.masked_fill_(self._unseen_B1RK, float("-inf"))
            self._bias_B1MK = bias_B1RK.repeat(1, 1, share, 1) if folds else bias_B1RK
        own_BR2GD = torch.stack([k_BRGD, v_BRGD], 2)
        stored = kv_pages.index_select(0, self._page_M)
        key_BKGD, value_BKGD = torch.cat([stored.view(len(own_BR2GD), -1, *own_BR2GD.shape[2:]), own_BR2GD], 1).unbind(
            2
        )
        k, v, bias = key_BKGD.transpose(1, 2), value_BKGD.transpose(1, 2), self._bias_B1MK
        if not folds:
            q = q_BRHD.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=share > 1).transpose(1, 2)
        B, R, H, D = q_BRHD.shape
        q = q_BRHD.unflatten(2, (-1, share)).permute(0, 2, 3, 1, 4).reshape(B, -1, share * R, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.view(B, -1, share, R, D).permute(0, 3, 1, 2, 4).reshape(B, R, H, D)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of x and residual, divided by its root mean square and scaled; and the sum itself, the next residual.

    x, residual  [.., W]; without a residual the sum is x
    """
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight.to(x.dtype), eps), total


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
    """Queries [B, R, H, D], keys and values [B, R, G, D] of a forward's rows, normed per head where there are weights,
    and rotated; keys and values of the clean rows go to the cache.

    qkv_BRW           projected rows, W = (H + 2 G) * D; of no use afterwards
    norm_weight_ND    of the N = H + G heads of queries and keys, in the dtype of qkv
    cos_BRD, sin_BRD  rotation of each row's position, both halves, in the dtype of qkv
    kv_pages          one layer of the cache [P, page_len, 2, G, D], written in place
    write_slot_BC     page * page_len + offset of the C leading rows, which are clean; the others leave no trace
    """
    kv_heads, size = kv_pages.shape[-2:]
    row_BRHD = qkv_BRW.unflatten(-1, (-1, size))
    turned = row_BRHD[:, :, : heads + kv_heads]
    x = turned
    if norm_weight_ND is not None:
        x = F.rms_norm(x, (size,), eps=eps) * norm_weight_ND
    first, second = x.chunk(2, -1)
    swapped = torch.cat([-second, first], -1)
    torch.add(x * cos_BRD[:, :, None], swapped.mul_(sin_BRD[:, :, None]), out=turned)
    q_BRHD, kv_BRHD = row_BRHD[:, :, :heads], row_BRHD[:, :, heads:]
    clean_BCHD = kv_BRHD[:, : write_slot_BC.shape[1]]
    kv_pages.view(-1, *kv_pages.shape[2:])[write_slot_BC] = clean_BCHD.unflatten(2, (2, kv_heads))
    return q_BRHD, kv_BRHD[:, :, :kv_heads], kv_BRHD[:, :, kv_heads:]


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [.., W], of a product [.., 2 W] that holds both."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
