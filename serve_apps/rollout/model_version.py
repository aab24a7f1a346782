"""Which weights does a service serve, and how?

A model's name is looked up once, so that every replica loads the same weights, whatever becomes of the name meanwhile.
"""

import time
from dataclasses import dataclass

from serve_apps.api.completion_response import ModelCard
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.hf_config import read_config
from tidar_core.artifacts.registry import model_registry
from tidar_core.errors import ConfigError

__all__ = ["ModelVersion", "ServingTarget", "resolve_model"]

HASH_SHOWN = 12
"""Characters of a bundle's hash that tell it from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A bundle, and how it is decoded."""

    settings: ServeSettings
    bundle_uri: str
    bundle_hash: str
    block_len: int
    """K of the decoder: 1 in the autoregressive mode."""
    version: int | None = None
    """In the registry; None for a bundle that was given by its location."""

    @property
    def fingerprint(self) -> str:
        """Same weights, same way of decoding: same string."""
        return f"{self.bundle_hash[:HASH_SHOWN]}-{self.settings.mode}-{self.block_len}"

    @property
    def label(self) -> str:
        """What logs and metrics call it: the registry's number, else the beginning of the hash."""
        return self.bundle_hash[:HASH_SHOWN] if self.version is None else str(self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTarget:
    """What replicas shall serve."""

    champion: ModelVersion
    challenger: ModelVersion | None = None
    proven: ModelVersion | None = None
    """The last champion that some replica has served: for a new replica that cannot load the present one."""


def resolve_model(settings: ServeSettings, model: str | None = None) -> tuple[ModelVersion, ModelCard]:
    """What `model` names now, by default that of the settings; reads the bundle's description, no weights.

    Raises RegistryError, BundleError or ConfigError.
    """
    model = model or settings.model
    found = model_registry.find_bundle(settings.tracking_uri, model)
    info = found.info
    shape = read_config(found.uri)
    if settings.context_len is not None and settings.context_len > shape.context_len:
        raise ConfigError(
            f"context_len is {settings.context_len}; the context of {model} is {shape.context_len}; "
            "give no more than that"
        )
    block_len = 1 if settings.mode == "autoregressive" else settings.block_len or info.block_len
    served = ModelVersion(
        settings=settings,
        bundle_uri=found.uri,
        bundle_hash=info.bundle_hash,
        block_len=block_len,
        version=found.version,
    )
    card = ModelCard(
        id=settings.shown_name,
        created=int(time.time()),
        max_model_len=settings.context_len or shape.context_len,
        block_len=block_len,
        bundle_hash=info.bundle_hash,
        mode=settings.mode,
    )
    return served, card
