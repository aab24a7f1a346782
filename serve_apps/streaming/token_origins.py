"""The origin of each token that a decode step produced."""

from typing import TYPE_CHECKING

from serve_apps.messages.token_origins import Origin

if TYPE_CHECKING:
    from tidar_core.decoding.request import DecodeStep

__all__ = ["origins"]


def origins(step: "DecodeStep") -> list[Origin]:
    """Origin of each new token of a decode step."""
    accepted, verified = max(0, step.accepted - 1), min(step.pending, step.verified) - 1
    drafts: list[Origin] = ["draft"] * accepted
    last: Origin = "correction" if accepted < verified else "bonus" if accepted else "plain"
    return [*drafts, last][: len(step.token_ids)]
