"""What does a decode step of a real model hand to attention, and how would torch alone answer?

Shape letters: B sequences, R rows of a forward, H query heads, G key-value heads, D head width, T tokens of the prefix,
K keys (prefix, own rows, padding to a multiple of 16).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.transformer.layout import decode_layout
from tidar_core.transformer.shapes import named_shape
from tidar_core.transformer.visibility import dense_visibility

__all__ = ["DRAFT_PLANS", "PAGE_LEN", "Case", "Scene", "flex_calls", "own_calls", "sdpa_calls"]

PAGE_LEN = 16
DRAFT_PLANS = {1: (1, ()), 16: (16, ()), 33: (17, (17,)), 272: (16, tuple(range(1, 17)))}
"""By rows: clean tokens and groups, for blocks of 16 masks: autoregressive, verification, one group, all groups."""
UNCACHED_BYTES = 192 << 20
"""Of keys and values that a graph's calls touch in turn, so that none finds its own in the L2 of 50 MB."""


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table."""

    shape: str
    rows: int
    context: int
    batch: int

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, head width."""
        config = named_shape(self.shape)
        return config.heads, config.kv_heads, config.head_size

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the prefixes in one layer."""
        _, kv_heads, size = self.heads
        return self.batch * self.context * 2 * kv_heads * size * 2

    @property
    def bytes(self) -> int:
        """What must be moved: prefixes, own keys and values, queries and results, each once."""
        heads, kv_heads, size = self.heads
        return self.kv_bytes + self.batch * self.rows * 2 * (heads + kv_heads) * size * 2

    @property
    def operations(self) -> int:
        """Of both products, for every row against every key."""
        heads, _, size = self.heads
        return 4 * self.batch * heads * self.rows * (self.context + self.rows) * size


class Scene:
    """Random bfloat16 tensors of a case, in as many layers as a cache does not hold."""

    def __init__(
        self,
        case: Case,
        *,
        prefix_lens: list[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        """prefix_lens  of each sequence; all as long as the context if not given"""
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
        """Of `paged_attention`."""
        return self.q, self.k, self.v, self.kv_pages[layer], self.page_table, self.prefix_len, self.own_visible

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, K, D] of prefix and own rows."""
        stored = self.kv_pages[layer][self.page_table].flatten(1, 2)
        joined = torch.cat([stored, torch.stack([self.k, self.v], 2)], 1)
        key, value = F.pad(joined, (0, 0, 0, 0, 0, 0, 0, -joined.shape[1] % 16)).permute(2, 0, 3, 1, 4).contiguous()
        return key, value


def own_calls(scene: Scene, attention: Callable[..., Tensor]) -> list[Callable[[], Tensor]]:
    """`attention` over the pages, layer by layer."""
    return [lambda layer=layer: attention(*scene.arguments(layer)) for layer in range(scene.layers)]  # type: ignore[misc]


def sdpa_calls(scene: Scene) -> list[Callable[[], Tensor]]:
    """One fused call over contiguous keys, as favourable as it gets: the query heads of a key head are rows of it, so
    that keys are read once, and visibility is a bias prepared beforehand."""
    batch, rows, heads, size = scene.q.shape
    kv_heads = scene.k.shape[2]
    share = heads // kv_heads
    q = scene.q.view(batch, rows, kv_heads, share, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    kv = [scene.contiguous(layer) for layer in range(scene.layers)]
    tokens, padding = scene.case.context, kv[0][0].shape[2] - scene.case.context - rows
    after = torch.arange(tokens, device=q.device) >= scene.prefix_len[:, None]
    dark = torch.cat([after[:, None].expand(-1, rows, -1), ~scene.own_visible.expand(batch, -1, -1)], -1)
    bias_BRK = torch.zeros(dark.shape, dtype=q.dtype, device=q.device).masked_fill_(dark, float("-inf"))
    bias_BRK = F.pad(bias_BRK, (0, padding), value=float("-inf"))
    bias = bias_BRK.repeat(1, share, 1)[:, None]
    return [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias) for k, v in kv]  # type: ignore[misc]


def flex_calls(scene: Scene) -> list[Callable[[], Tensor]]:
    """Compiled FlexAttention over contiguous keys, its block mask prepared beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = scene.q.transpose(1, 2).contiguous()
    kv = [scene.contiguous(layer) for layer in range(scene.layers)]
    rows, tokens, prefix_len, own = scene.case.rows, scene.case.context, scene.prefix_len, scene.own_visible

    def visible(b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= tokens) & (key < tokens + rows)
        return (key < prefix_len[b]) | (in_own & own[row, (key - tokens).clamp(0, rows - 1)])

    block_mask = create_block_mask(visible, len(q), None, rows, kv[0][0].shape[2], device=q.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return [lambda k=k, v=v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True) for k, v in kv]  # type: ignore[misc]
