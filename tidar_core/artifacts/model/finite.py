"""Check that the weights and logits of a model are finite.

Are all weights finite, and the logits of a forward too?

Texts do not reveal a model of nan: every mode chooses token 0, and so all modes agree.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tidar_core.decoding.autoregressive import score
from tidar_core.errors import BundleError
from tidar_core.transformer.model import TidarModel

__all__ = ["FINITE_NEEDED", "require_finite", "require_finite_weights"]

FINITE_NEEDED = "a finite model is needed; fetch it again, or train it again with a lower learning_rate"
"""The rest of an error about a model that is not finite, whose origin is not known."""

TOKENS = 8
"""Tokens of the test forward. A few suffice: weights that are too large overflow on any text."""


@torch.no_grad()
def require_finite(model: TidarModel, uri: str) -> None:
    """Raise BundleError if a weight or a log-probability of the model at `uri` is nan or infinite."""
    require_finite_weights(dict(model.named_parameters()), uri)
    tokens = tuple(range(min(TOKENS, model.config.context_len, model.config.vocab_size)))
    if not score(model, tokens).logprob_L.isfinite().all():
        raise BundleError(
            f"{uri} has finite weights whose logits are not finite in {str(model.embedding.weight.dtype)[6:]}; "
            f"{FINITE_NEEDED}"
        )


@torch.no_grad()
def require_finite_weights(weights: Mapping[str, Tensor], uri: str) -> None:
    """Raise BundleError if a weight of the model at `uri` is nan or infinite."""
    named = list(weights.items())
    finite = torch.stack([torch.stack(weight.aminmax()).isfinite().all() for _, weight in named]).tolist()
    wrong = [name for (name, _), good in zip(named, finite) if not good]
    if wrong:
        raise BundleError(
            f"{uri} has weights that are not finite, in {len(wrong)} of {len(named)} tensors, such as {wrong[0]}; "
            f"{FINITE_NEEDED}"
        )
