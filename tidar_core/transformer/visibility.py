"""Rule of visibility: which token may attend to which.

The module holds the only rule, and the forms of it that attention backends need. Training, prefill and decoding call
nothing else.
"""

from collections.abc import Callable

from torch import Tensor

from tidar_core.transformer.layout import CLEAN, TokenLayout

__all__ = ["dense_visibility", "flex_rule", "sees"]


def sees(query: TokenLayout, key: TokenLayout) -> Tensor:
    """Whether each query token may attend to each key token.

    A token sees the clean tokens of its document up to its horizon; a mask token also sees its own block, up to its
    reach.

    query, key  facts that broadcast against each other
    """
    same_document = query.document == key.document
    known = (key.block == CLEAN) & (key.position <= query.horizon)
    own_block = (query.block != CLEAN) & (query.block == key.block) & (key.position <= query.reach)
    return same_document & (known | own_block)


def dense_visibility(query: TokenLayout, key: TokenLayout) -> Tensor:
    """Boolean matrix [.., Q, K]: True where a query (row) sees a key (column)."""
    return sees(query[..., :, None], key[..., None, :])


def flex_rule(query: TokenLayout, key: TokenLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule over indices, as `torch.nn.attention.flex_attention.create_block_mask` calls it."""

    def visible(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(query[b, q], key[b, k])

    return visible
