"""Attention workloads of real models' decode steps, and the calls that torch alone offers for them.

Shape letters: B sequences, R query tokens of a forward, H query heads, G key-value heads, D head width,
T tokens of the prefix, K keys (prefix, own query tokens, padding to a multiple of 16).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.transformer.layout import decode_layout
from tidar_core.transformer.shapes import named_shape
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["DRAFT_PLANS", "PAGE_LEN", "Case", "Workload", "flex_calls", "own_calls", "sdpa_calls"]

PAGE_LEN = 16
DRAFT_PLANS = {1: (1, ()), 16: (16, ()), 33: (17, (17,)), 272: (16, tuple(range(1, 17)))}
"""Clean tokens and groups by number of query tokens, for blocks of 16 masks. The plans are autoregressive,
verification, one group, all groups."""
UNCACHED_BYTES = 192 << 20
"""Bytes of keys and values that a graph's calls read in turn, so that no call finds its own in the L2 of 50 MB."""


@dataclass(frozen=True, slots=True)
class Case:
    """Shape of one measurement."""

    shape: str
    rows: int
    """Query tokens of a sequence."""
    context: int
    """Tokens of each prefix."""
    batch: int

    @property
    def heads(self) -> tuple[int, int, int]:
        """Numbers of query heads and key-value heads, and head width."""
        config = named_shape(self.shape)
        return config.heads, config.kv_heads, config.head_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of the prefixes in one layer, in bfloat16."""
        _, kv_heads, size = self.heads
        return self.batch * self.context * 2 * kv_heads * size * 2

    @property
    def bytes(self) -> int:
        """Bytes that must be moved: prefixes, own keys and values, queries and results, each once."""
        heads, kv_heads, size = self.heads
        return self.kv_bytes + self.batch * self.rows * 2 * (heads + kv_heads) * size * 2

    @property
    def operations(self) -> int:
        """Floating-point operations of both products, for every query against every key."""
        heads, _, size = self.heads
        return 4 * self.batch * heads * self.rows * (self.context + self.rows) * size


class Workload:
    """Random tensors of a case, in as many layers as do not fit in a cache; bfloat16 by default."""

    def __init__(
        self,
        case: Case,
        *,
        prefix_lens: list[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        """prefix_lens  tokens of each sequence's prefix; the whole context if not given"""
        torch.manual_seed(0)
        self.case = case
        heads, kv_heads, size = case.heads
        pages = case.context // PAGE_LEN
        self.layers = max(1, min(256, UNCACHED_BYTES // case.kv_bytes)) if prefix_lens is None else 1

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        self.q = normal(case.batch, case.rows, heads, size)
        self.k, self.v = normal(2, case.batch, case.rows, kv_heads, size)
        self.kv_pages = normal(self.layers, case.batch * pages + 1, PAGE_LEN, 2, kv_heads, size)
        self.page_table = 1 + torch.randperm(case.batch * pages, device=device).view(case.batch, pages).int()
        self.prefix_len = torch.tensor(prefix_lens or [case.context] * case.batch, device=device)
        layout = decode_layout(torch.zeros(1, dtype=torch.long, device=device), *DRAFT_PLANS[case.rows], 16)[0]
        self.own_visible = dense_visibility(layout, layout)

    def arguments(self, layer: int = 0) -> tuple[Tensor, ...]:
        """Arguments of `paged_attention` for one layer."""
        return self.q, self.k, self.v, self.kv_pages[layer], self.page_table, self.prefix_len, self.own_visible

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, K, D] of prefix and own query tokens in one layer."""
        stored = self.kv_pages[layer][self.page_table].flatten(1, 2)
        joined = torch.cat([stored, torch.stack([self.k, self.v], 2)], 1)
        key, value = F.pad(joined, (0, 0, 0, 0, 0, 0, 0, -joined.shape[1] % 16)).permute(2, 0, 3, 1, 4).contiguous()
        return key, value


def own_calls(workload: Workload, attention: Callable[..., Tensor]) -> list[Callable[[], Tensor]]:
    """Calls of `attention` over the pages, one for each layer."""
    return [lambda layer=layer: attention(*workload.arguments(layer)) for layer in range(workload.layers)]


def sdpa_calls(workload: Workload) -> list[Callable[[], Tensor]]:
    """Calls of torch's fused attention over contiguous keys, in its most favourable form.

    The query heads of a key head are folded into its queries, so that keys are read once. Visibility is a bias that is
    prepared beforehand.
    """
    batch, rows, heads, size = workload.q.shape
    kv_heads = workload.k.shape[2]
    share = heads // kv_heads
    q = workload.q.view(batch, rows, kv_heads, share, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    kv = [workload.contiguous(layer) for layer in range(workload.layers)]
    tokens, padding = workload.case.context, kv[0][0].shape[2] - workload.case.context - rows
    after = torch.arange(tokens, device=q.device) >= workload.prefix_len[:, None]
    dark = torch.cat([after[:, None].expand(-1, rows, -1), ~workload.own_visible.expand(batch, -1, -1)], -1)
    bias_BRK = torch.zeros(dark.shape, dtype=q.dtype, device=q.device).masked_fill_(dark, float("-inf"))
    bias_BRK = F.pad(bias_BRK, (0, padding), value=float("-inf"))
    bias = bias_BRK.repeat(1, share, 1)[:, None]
    return [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias) for k, v in kv]


def flex_calls(workload: Workload) -> list[Callable[[], Tensor]]:
    """Calls of compiled FlexAttention over contiguous keys; its block mask is prepared beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = workload.q.transpose(1, 2).contiguous()
    kv = [workload.contiguous(layer) for layer in range(workload.layers)]
    rows, tokens, prefix_len, own = workload.case.rows, workload.case.context, workload.prefix_len, workload.own_visible

    def visible(b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= tokens) & (key < tokens + rows)
        return (key < prefix_len[b]) | (in_own & own[row, (key - tokens).clamp(0, rows - 1)])

    block_mask = create_block_mask(visible, len(q), None, rows, kv[0][0].shape[2], device=q.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return [lambda k=k, v=v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True) for k, v in kv]
