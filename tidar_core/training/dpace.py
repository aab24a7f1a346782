"""Weights of a block's tokens by how far its drafts are likely to be accepted (D-PACE, arXiv 2605.18810).

The expected number of accepted drafts is a sum of products of chances, since a draft counts only if all drafts before
it are accepted. Its derivative weighs the cross-entropy at offset j by the sum, over m >= j, of the product of
the chances at offsets 1..m. The chance of a label is its probability q, smoothed to (1 - a) q + a.

The chain begins at offset 1, because decoding takes the first token of a block from the AR mode. The weights are not
divided by their sum, which would cancel the chances (the paper's author on SpecForge, issue 828).

Shape letters: B rows, M tokens of the mask half, K block length.
"""

import torch
from torch import Tensor

__all__ = ["SMOOTHING", "dpace_weights"]

SMOOTHING = 0.5
"""a: chance of a label whose probability is 0. Without it, tokens behind a hopeless one would have no weight."""


@torch.no_grad()
def dpace_weights(loss_BM: Tensor, labelled_BM: Tensor, offset_BM: Tensor, block_len: int) -> Tensor:
    """Weight [B, M] of each label, fp32; 1 at offset 0. Tokens without a label are left out of chain and sum.

    loss_BM      cross-entropy of each label in nats
    labelled_BM  whether the token has a label
    offset_BM    offset of each token in its block; blocks are runs of tokens
    block_len    length of the longest block
    """
    rows, index = (torch.arange(n, device=loss_BM.device) for n in loss_BM.shape)
    place = rows[:, None], index - offset_BM, offset_BM
    chained_BM = labelled_BM & (offset_BM > 0)
    chance_BM = torch.where(chained_BM, (1 - SMOOTHING) * torch.exp(-loss_BM.float()) + SMOOTHING, 1.0)
    grid = (*loss_BM.shape, block_len)
    chance_BMK = torch.ones(grid, device=loss_BM.device).index_put(place, chance_BM)  # blocks at their first token
    counts_BMK = torch.zeros(grid, device=loss_BM.device).index_put(place, chained_BM.float())
    reached_BMK = chance_BMK.cumprod(-1) * counts_BMK
    ahead_BMK = reached_BMK.flip(-1).cumsum(-1).flip(-1)
    return torch.where(offset_BM > 0, ahead_BMK[place], 1.0)
