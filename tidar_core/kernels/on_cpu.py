"""Kernels in C for a decode step on a CPU, called with tensors.

How does a tensor reach a C kernel?

`reference` defines what each function computes; `layer.c` and `attention.c` compute it. A token's results do not
depend, bit for bit, on how many tokens a forward has, nor on tokens that it does not see. So a forward of many query
tokens has the bits of as many forwards of one.

All tensors are of one dtype of `DTYPES`; only the weight of a norm may be of the other.

Shape letters as in `reference`.
"""

import torch
from torch import Tensor

from tidar_core.kernels.compiled import needed_library
from tidar_core.kernels.draft_maps import CompiledMap

__all__ = [
    "DTYPES",
    "Gathering",
    "add_rms_norm",
    "likeliest",
    "linked_drafts",
    "paged_attention",
    "rotate_and_store",
    "silu_mul",
]

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the kernels take."""
HALF = torch.bfloat16


def paged_attention(
    q_BRHD: Tensor,
    k_BRGD: Tensor,
    v_BRGD: Tensor,
    kv_pages: Tensor,
    page_table_BN: Tensor,
    prefix_len_B: Tensor,
    own_visible_RR: Tensor,
) -> Tensor:
    """Attention values [B, R, H, D] of the query tokens of one forward."""
    return Gathering(page_table_BN, prefix_len_B, own_visible_RR, kv_pages.shape[1])(q_BRHD, k_BRGD, v_BRGD, kv_pages)


class Gathering:
    """`paged_attention` for all layers of a forward. Keys and values are read where they lie."""

    def __init__(self, page_table_BN: Tensor, prefix_len_B: Tensor, own_visible_RR: Tensor, page_len: int) -> None:
        """Takes the arguments of `paged_attention`."""
        self._table_BN, self._prefix_len_B = page_table_BN.long(), prefix_len_B.long().contiguous()
        self._visible_RR = own_visible_RR.contiguous()
        stride, pages = self._table_BN.stride(0), page_table_BN.shape[1]
        self.shared = (
            page_len, self._table_BN.data_ptr(), stride, pages, self._prefix_len_B.data_ptr(),
            self._visible_RR.data_ptr(), len(page_table_BN), len(own_visible_RR),
        )  # fmt: skip
        """Arguments of `paged_attention` in C that all layers share."""
        self._attend = needed_library().paged_attention

    def __call__(self, q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor, kv_pages: Tensor) -> Tensor:
        """Values [B, R, H, D]."""
        _, R, H, D = q_BRHD.shape
        q_stride, kv_stride = q_BRHD.stride(1), k_BRGD.stride(1)
        assert len(q_BRHD) == 1 or q_BRHD.stride(0) == R * q_stride, (
            "sequences of queries lie at another distance than their tokens"
        )
        assert k_BRGD.stride() == v_BRGD.stride(), "keys and values lie at different distances"
        out = torch.empty_like(q_BRHD, memory_format=torch.contiguous_format)
        self._attend(
            q_BRHD.data_ptr(), k_BRGD.data_ptr(), v_BRGD.data_ptr(), q_stride, kv_stride, kv_pages.data_ptr(),
            *self.shared, H, k_BRGD.shape[2], D, q_BRHD.dtype == HALF, out.data_ptr(),
        )  # fmt: skip
        return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed sum of x and residual, and the sum itself, which is the next residual."""
    width, normed = x.shape[-1], torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    needed_library().add_rms_norm(
        x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(), weight.dtype == HALF, eps,
        x.numel() // width, width, x.dtype == HALF, normed.data_ptr(), total.data_ptr(),
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
    """Queries [B, R, H, D], keys and values [B, R, G, D] of a forward's query tokens; all are views of `qkv_BRW`."""
    kv_heads, size = kv_pages.shape[-2:]
    B, R, _ = qkv_BRW.shape
    needed_library().rotate_and_store(
        qkv_BRW.data_ptr(), None if norm_weight_ND is None else norm_weight_ND.data_ptr(), cos_BRD.data_ptr(),
        sin_BRD.data_ptr(), kv_pages.data_ptr(), write_slot_BC.data_ptr(), B * R, R, write_slot_BC.shape[1], heads,
        kv_heads, size, eps, qkv_BRW.dtype == HALF,
    )  # fmt: skip
    q, k, v = qkv_BRW.view(B, R, -1, size).split_with_sizes((heads, kv_heads, kv_heads), 2)
    return q, k, v


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [.., W]."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    needed_library().silu_mul(gate_up.data_ptr(), y.numel() // width, width, gate_up.dtype == HALF, y.data_ptr())
    return y


def linked_drafts(
    logits_BKV: Tensor,
    before_B: Tensor,
    rows: Tensor,
    state_BKR: Tensor | None = None,
    after: CompiledMap | None = None,
) -> Tensor:
    """Likeliest tokens [B, K]; each follows from the one before it. A link corrects the logits in place.

    before_B   token before the first; each sequence has one, in whatever shape
    rows       of all tokens: logits [V, V] to add, or what the map `after` reads [V, R]
    state_BKR  what the map reads of each mask besides, if it does
    """
    (B, K, V), before_B = logits_BKV.shape, before_B.contiguous()
    state_BKR = None if state_BKR is None else state_BKR.contiguous()
    read = [x for x in (logits_BKV, rows, state_BKR) if x is not None]
    assert all(x.is_contiguous() and x.dtype == logits_BKV.dtype for x in read), "tensors differ, or are in pieces"
    draft_BK = torch.empty((B, K), dtype=torch.long)
    state, panels = None if state_BKR is None else state_BKR.data_ptr(), None if after is None else after.address
    needed_library().linked_drafts(
        logits_BKV.data_ptr(), before_B.data_ptr(), rows.data_ptr(), state, panels, B, K, V, rows.shape[1],
        logits_BKV.dtype == HALF, draft_BK.data_ptr(),
    )  # fmt: skip
    return draft_BK


def likeliest(logits: Tensor) -> Tensor:
    """Ids [..] of the largest logits [.., V]; the least id where several are equal, as `argmax` has it."""
    *rows, width = logits.shape
    found = torch.empty(rows, dtype=torch.long)
    if logits.dim() == 3 and logits.stride()[1:] == (width, 1):
        outer, inner, apart = *rows, logits.stride(0)
    else:
        logits = logits.contiguous()
        outer, inner, apart = found.numel(), 1, width
    needed_library().likeliest(
        logits.data_ptr(), outer, inner, apart, width, logits.dtype == HALF, found.data_ptr()
    )  # fmt: skip
    return found
