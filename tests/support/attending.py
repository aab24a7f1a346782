"""Texts whose attention is computed in pieces, over keys and values in shuffled pages."""

import torch

from tidar_core.kernels import PLAIN, on_cpu

PAGE_LEN = 16


class Text:
    """Queries, keys and values of the tokens of a text, of normal numbers."""

    def __init__(self, length, *, heads, kv_heads, size, dtype=torch.float32, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.length, pages = length, -(-length // PAGE_LEN)
        self.q, self.k, self.v = (
            torch.randn(1, length, n, size, generator=draw).to(dtype) for n in (heads, kv_heads, kv_heads)
        )
        self.table = torch.randperm(pages + 2, generator=draw)[:pages][None]
        filled = torch.zeros(pages * PAGE_LEN, 2, kv_heads, size, dtype=dtype)
        filled[:length] = torch.stack([self.k[0], self.v[0]], 1)
        self.pages = torch.zeros(pages + 2, PAGE_LEN, 2, kv_heads, size, dtype=dtype)
        self.pages[self.table[0]] = filled.view(pages, PAGE_LEN, 2, kv_heads, size)

    def call(self, first, last, visible=None):
        """Arguments of `paged_attention` for tokens first to last; by default each sees those before."""
        rows = slice(first, last)
        return {
            "q_BRHD": self.q[:, rows],
            "k_BRGD": self.k[:, rows],
            "v_BRGD": self.v[:, rows],
            "kv_pages": self.pages,
            "page_table_BN": self.table[:, : -(-first // PAGE_LEN)],
            "prefix_len_B": torch.tensor([first]),
            "own_visible_RR": torch.ones(last - first, last - first).tril().bool() if visible is None else visible,
        }

    def read(self, *ends):
        """Values of all tokens, read in chunks that end there, by the kernels in C."""
        chunks = zip((0, *ends), (*ends, self.length))
        return torch.cat([on_cpu.paged_attention(**self.call(*chunk)) for chunk in chunks], 1)


def by_definition(call):
    """The values that `reference` computes in fp32."""
    return PLAIN.paged_attention(**{name: x.float() if x.is_floating_point() else x for name, x in call.items()})
