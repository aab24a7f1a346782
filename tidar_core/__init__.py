"""Core of TiDAR: model, training, decoding and planning, with torch and the standard library alone.

The public names load their modules at first use. So a process that decodes nothing, such as an ingress, starts without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidar_core.config import DraftConfig, ModelConfig, SamplingConfig
    from tidar_core.decoding.autoregressive import generate_autoregressive
    from tidar_core.decoding.decoder import Decoder
    from tidar_core.decoding.request import DecodeStep, Request
    from tidar_core.decoding.scheduler import Scheduler
    from tidar_core.errors import TidarError
    from tidar_core.training.objective import Objective
    from tidar_core.transformer.layout import TokenLayout
    from tidar_core.transformer.model import TidarModel
    from tidar_core.transformer.visibility import sees

__all__ = [
    "DecodeStep",
    "Decoder",
    "DraftConfig",
    "ModelConfig",
    "Objective",
    "Request",
    "SamplingConfig",
    "Scheduler",
    "TidarError",
    "TidarModel",
    "TokenLayout",
    "generate_autoregressive",
    "sees",
]

HOMES = {
    "DecodeStep": "decoding.request",
    "Decoder": "decoding.decoder",
    "DraftConfig": "config",
    "ModelConfig": "config",
    "Objective": "training.objective",
    "Request": "decoding.request",
    "SamplingConfig": "config",
    "Scheduler": "decoding.scheduler",
    "TidarError": "errors",
    "TidarModel": "transformer.model",
    "TokenLayout": "transformer.layout",
    "generate_autoregressive": "decoding.autoregressive",
    "sees": "transformer.visibility",
}
"""Public name -> module."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
