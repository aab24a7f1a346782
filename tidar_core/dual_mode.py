"""What does a packed row become when it is trained in both modes at once?

The clean half is read causally and predicts the next token; the mask half predicts, at each position, the token that
belongs there (TiDAR, section 3.1: full masking, no shift on the mask half).

Shape letters: B rows, S tokens of a row, L tokens of a layout (S or 2S).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_core.layout import PADDING, TokenLayout, causal_layout, training_layout

__all__ = ["IGNORED", "TrainBatch", "ar_batch", "dual_mode_batch"]

IGNORED = -100
"""Target of a row that no loss looks at."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Input tokens, who they are, and what each half must predict."""

    token_BL: Tensor
    layout: TokenLayout
    ar_target_BS: Tensor
    """Next token of the same document, for the first S rows; IGNORED at the end of a document."""
    diffusion_target_BS: Tensor | None
    """Token at the mask's own position, for the last S rows; IGNORED in a document's first block, whose masks see
    nothing. None when there is no mask half."""


def ar_batch(input_ids_BS: Tensor, document_BS: Tensor) -> TrainBatch:
    """Packed rows for ordinary next-token training."""
    return TrainBatch(input_ids_BS, causal_layout(document_BS), _next_token(input_ids_BS, document_BS), None)


def dual_mode_batch(input_ids_BS: Tensor, document_BS: Tensor, block_len: int, mask_id: int) -> TrainBatch:
    """Packed rows, doubled: clean tokens, then as many mask tokens at the same positions."""
    S = input_ids_BS.shape[1]
    layout = training_layout(document_BS, block_len)
    trained = (document_BS != PADDING) & (layout.block[:, S:] > 0)
    return TrainBatch(
        torch.cat([input_ids_BS, torch.full_like(input_ids_BS, mask_id)], 1),
        layout,
        _next_token(input_ids_BS, document_BS),
        torch.where(trained, input_ids_BS, IGNORED),
    )


def _next_token(input_ids_BS: Tensor, document_BS: Tensor) -> Tensor:
    target_BS = torch.full_like(input_ids_BS, IGNORED)
    goes_on = (document_BS[:, 1:] == document_BS[:, :-1]) & (document_BS[:, 1:] != PADDING)
    target_BS[:, :-1] = torch.where(goes_on, input_ids_BS[:, 1:], IGNORED)
    return target_BS
