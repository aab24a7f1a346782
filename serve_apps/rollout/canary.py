"""Canary: limits of a challenger, and the check against them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.messages.version_stats import VersionStats

__all__ = ["CanarySettings", "failure"]


class CanarySettings(BaseModel):
    """Share of the traffic that a challenger gets, and limits that it must keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] = "challenger"
    """Alias of the challenger; there is no challenger if it names no version, or the champion."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the clients that the challenger serves; with 0 it serves only requests whose header selects it."""
    texts: Annotated[int, Field(ge=1)] = 200
    """Number of texts before the challenger is judged; in a comparison the champion needs as many."""
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of its texts that may fail by the server's fault."""
    tokens_per_forward: Annotated[float, Field(ge=0)] | None = None
    """Least tokens per forward; by default only the comparison with the champion counts."""
    of_champion: Annotated[float, Field(ge=0)] = 0.9
    """Least tokens per forward, as a share of the champion's in the same time; 0 switches the comparison off."""


def failure(limits: CanarySettings, challenger: VersionStats, champion: VersionStats) -> str | None:
    """Reason in words why a challenger must be rolled back; None while it may stay.

    Errors are judged as soon as no outcome of the missing texts can bring their share below the limit. The other
    limits are judged once there are enough texts.
    """
    written = challenger.texts + challenger.errors
    errors = challenger.errors / max(written, limits.texts)
    if errors > limits.error_rate:
        return f"{challenger.errors} of {written} texts failed; at most {limits.error_rate:g} of all may"
    if challenger.texts < limits.texts:
        return None
    speed = challenger.tokens_per_forward
    if limits.tokens_per_forward is not None and speed < limits.tokens_per_forward:
        return f"{speed:.3f} tokens per forward; at least {limits.tokens_per_forward:g} are required"
    if champion.texts >= limits.texts and speed < limits.of_champion * champion.tokens_per_forward:
        return (
            f"{speed:.3f} tokens per forward beside the champion's {champion.tokens_per_forward:.3f}; "
            f"at least {limits.of_champion:g} of that is required"
        )
    return None
