"""Has a challenger failed its trial?"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.messages.version_stats import VersionStats

__all__ = ["Trial", "failure"]


class Trial(BaseModel):
    """How much a challenger answers, and what it must not fall short of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] = "challenger"
    """Which version is the challenger; none is where the alias names none, or the champion."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the clients that it answers; with 0, those requests alone that ask for it by header."""
    texts: Annotated[int, Field(ge=1)] = 200
    """So many texts are enough to judge it, and the champion where they are compared."""
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Most of its texts that the server may fail to write, as a share of all."""
    tokens_per_forward: Annotated[float, Field(ge=0)] | None = None
    """Least tokens per forward; by default the champion alone is the measure."""
    of_champion: Annotated[float, Field(ge=0)] = 0.9
    """Least tokens per forward, as a share of the champion's in the same time; with 0 they are not compared."""


def failure(trial: Trial, challenger: VersionStats, champion: VersionStats) -> str | None:
    """Why a challenger must go, in words; None while it may stay.

    Errors are judged as soon as they are too many for any outcome of the texts still missing, the rest once there are
    enough texts.
    """
    written = challenger.texts + challenger.errors
    errors = challenger.errors / max(written, trial.texts)
    if errors > trial.error_rate:
        return f"{challenger.errors} of {written} texts failed; at most {trial.error_rate:g} of all may"
    if challenger.texts < trial.texts:
        return None
    speed = challenger.tokens_per_forward
    if trial.tokens_per_forward is not None and speed < trial.tokens_per_forward:
        return f"{speed:.3f} tokens per forward; at least {trial.tokens_per_forward:g} are asked for"
    if champion.texts >= trial.texts and speed < trial.of_champion * champion.tokens_per_forward:
        return (
            f"{speed:.3f} tokens per forward beside the champion's {champion.tokens_per_forward:.3f}; "
            f"at least {trial.of_champion:g} of that is asked for"
        )
    return None
