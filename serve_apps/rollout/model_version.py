"""Version of a model that a service serves: its weights and its decoding.

A model is a bundle, or a checkpoint, which has the autoregressive mode alone.

A model's name is looked up once, so that every replica loads the same weights even if the name changes meanwhile.
"""

import time
from dataclasses import dataclass, replace

from serve_apps.api.completion_response import ModelCard
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle_info import DraftsInfo, model_config
from tidar_core.artifacts.registry import model_registry
from tidar_core.config import AUTOREGRESSIVE, mode_of
from tidar_core.errors import ConfigError

__all__ = ["ModelVersion", "ServingTarget", "resolve_model"]

HASH_SHOWN = 12
"""Characters of a bundle's hash that identify it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A bundle or a checkpoint with the settings of its decoding."""

    settings: ServeSettings
    bundle_uri: str
    bundle_hash: str
    block_len: int
    """K of the decoder: 1 in the autoregressive mode."""
    drafting: bool = True
    """Whether the model drafts; a checkpoint does not."""
    drafts: DraftsInfo | None = None
    """Drafts of a frozen checkpoint; None for any other model."""
    version: int | None = None
    """Number in the registry; None for a model that was given by its location."""

    @property
    def mode(self) -> str:
        """Mode of the decoder."""
        return self.settings.mode if self.drafting else AUTOREGRESSIVE

    @property
    def fingerprint(self) -> str:
        """The same string for the same weights and the same method of decoding."""
        return f"{self.bundle_hash[:HASH_SHOWN]}-{self.mode}-{self.block_len}"

    def shares_base(self, other: "ModelVersion") -> bool:
        """Whether an engine of the other version serves this version once it has loaded its drafts."""
        ours, theirs = self.drafts, other.drafts
        if ours is None or theirs is None:
            return False
        decoding = (self.settings, self.block_len) == (other.settings, other.block_len)
        return decoding and ours == replace(theirs, base_uri=ours.base_uri)

    @property
    def label(self) -> str:
        """Name in logs and metrics: the registry's number, else the beginning of the hash."""
        return self.bundle_hash[:HASH_SHOWN] if self.version is None else str(self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTarget:
    """Versions that replicas are to serve."""

    champion: ModelVersion
    challenger: ModelVersion | None = None
    proven: ModelVersion | None = None
    """Last champion that a replica has served; a new replica that cannot load the champion serves it instead."""


def resolve_model(settings: ServeSettings, model: str | None = None) -> tuple[ModelVersion, ModelCard]:
    """Version that `model`, by default the model of the settings, names now, with its card.

    Reads the bundle's description, no weights. Raises RegistryError, BundleError or ConfigError.
    """
    model = model or settings.model
    found = model_registry.find_bundle(settings.tracking_uri, model)
    info = found.info
    shape = model_config(found.uri)
    if settings.context_len is not None and settings.context_len > shape.context_len:
        raise ConfigError(
            f"context_len is {settings.context_len}; the context of {model} is {shape.context_len}; "
            "give at most that number"
        )
    mode = mode_of(shape, settings.mode if "mode" in settings.model_fields_set else None, default=settings.mode)
    block_len = 1 if mode == AUTOREGRESSIVE else settings.block_len or info.block_len
    served = ModelVersion(
        settings=settings,
        bundle_uri=found.uri,
        bundle_hash=info.bundle_hash,
        block_len=block_len,
        drafting=shape.drafting,
        drafts=info.drafts,
        version=found.version,
    )
    card = ModelCard(
        id=settings.shown_name,
        created=int(time.time()),
        max_model_len=settings.context_len or shape.context_len,
        block_len=block_len,
        bundle_hash=info.bundle_hash,
        mode=mode,
    )
    return served, card
