"""Arithmetic that a train step needs, and the peak of the device.

The count is of needed operations, not of executed ones. Recomputed operations (checkpointing) and unused ones (masked
scores of a tile) do not count. So the share of the device's peak (MFU) is comparable between methods. A
multiplication and its addition are two operations. The backward pass needs twice the operations of the forward pass.

Shape letters: B rows, S tokens of a row.
"""

import time

import torch
from torch import Tensor

from tidar_core.config import ModelConfig
from tidar_core.transformer.layout import CLEAN, PADDING, TokenLayout, causal_layout, training_layout

__all__ = ["layout_pairs", "matmul_peak", "matmul_weights", "train_flops", "visible_pairs"]


def matmul_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: layers and head; not embedding, norms, biases and links."""
    attention = 2 * (config.heads + config.kv_heads) * config.head_size
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.layers * layer + config.hidden_size * config.vocab_size


def visible_pairs(document_BS: Tensor, block_len: int | None = None) -> int:
    """Pairs of a token and a token that it sees, without padding.

    document_BS  document of each token of packed rows
    block_len    counts the pairs of the doubled rows with this block length; `None`: of next-token rows
    """
    layout = causal_layout(document_BS) if block_len is None else training_layout(document_BS, block_len)
    return int(layout_pairs(layout))


def layout_pairs(layout: TokenLayout) -> Tensor:
    """`visible_pairs` of a training layout, as a tensor on the device."""
    before = layout.position - layout.horizon
    # A block of n masks that see it all has n^2 pairs, the first n odd numbers; of causal masks, 1 + .. + n.
    in_block = torch.where(layout.reach == layout.position, before, 2 * before - 1) * (layout.block != CLEAN)
    return torch.where(layout.document != PADDING, layout.horizon + 1 + in_block, 0).sum()


def train_flops(config: ModelConfig, tokens: int, pairs: int, masks: int = 0) -> int:
    """Operations of forward and backward pass.

    With a draft adapter the checkpoint is frozen: clean tokens go forward through the layers alone, and masks backward
    without gradients of the checkpoint's weights. All pairs count as pairs of masks; the adapter counts as nothing.

    tokens  tokens that go through the model: both halves of the doubled row count
    pairs   from `visible_pairs`; each costs a product along the head width for its score and one for its value
    masks   mask tokens among `tokens`; read for a frozen checkpoint alone
    """
    attention = 12 * config.layers * config.heads * config.head_size * pairs
    if config.adapter is None:
        return 6 * matmul_weights(config) * tokens + attention
    layers = matmul_weights(config) - config.hidden_size * config.vocab_size
    return 2 * layers * (tokens - masks) + 4 * matmul_weights(config) * masks + attention


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int = 8192, repeats: int = 10) -> float:
    """Operations per second of a large square product of random numbers on this device: the ceiling for MFU."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    _wait(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
