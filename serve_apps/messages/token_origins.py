"""Origin of each token of a text: an accepted draft, or a token of the model's autoregressive side."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Decoding", "Origin"]

Origin = Literal["draft", "correction", "bonus", "plain"]
"""Origin of a token; `Decoding.origin` defines the values."""


class Decoding(BaseModel):
    """Origin of the generated tokens; each list has an entry for each token."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    forward: list[int] = []
    """Number of the forward that produced the token, counted from 0 in this text."""
    origin: list[Origin] = []
    """`draft`: an accepted draft. `correction`: replaces the first rejected draft. `bonus`: follows a draft that was
    accepted as a whole. `plain`: produced by a forward that verified no draft."""
    text_offset: list[int] = []
    """Character of the choice's text where the token's text begins; it ends where the next token's text begins. The
    text of a message is its generated text: calls of functions count."""

    @classmethod
    def joined(cls, parts: Sequence["Decoding"]) -> "Decoding | None":
        """Origin of the tokens of several deltas; None if there is none, because it was not requested."""
        if not parts:
            return None
        return cls(**{name: [entry for part in parts for entry in getattr(part, name)] for name in cls.model_fields})
