"""Core of TiDAR: model, training, decoding and planning, with torch and the standard library alone."""

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
