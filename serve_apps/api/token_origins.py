"""Which tokens of a text were drafted, and which did the autoregressive side of the model have to say itself?"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from tidar_core.decoding.request import DecodeStep

__all__ = ["Decoding", "Origin", "origins"]

Origin = Literal["draft", "correction", "bonus", "plain"]
"""See `Decoding.origin`."""


class Decoding(BaseModel):
    """How tokens came to be, one entry of each list for each token that was written."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    forward: list[int] = []
    """Which of the forwards that wrote this text brought it, from 0; tokens of one number came together."""
    origin: list[Origin] = []
    """`draft` stood; `correction` took the place of the first draft that fell; `bonus` followed a draft that stood as a
    whole; `plain` came of a forward that put no draft to the test."""
    text_offset: list[int] = []
    """Where its text begins in the choice's text, in characters; it ends where that of the next token begins."""


def origins(step: "DecodeStep") -> list[Origin]:
    """Of each new token of a step."""
    stood, tested = max(0, step.accepted - 1), min(step.pending, step.verified) - 1
    drafts: list[Origin] = ["draft"] * stood
    last: Origin = "correction" if stood < tested else "bonus" if stood else "plain"
    return [*drafts, last][: len(step.token_ids)]
