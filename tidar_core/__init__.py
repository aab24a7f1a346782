"""The mathematics of TiDAR: torch and the standard library, nothing else."""

from tidar_core.autoregressive import generate_autoregressive
from tidar_core.batcher import Batcher
from tidar_core.config import DraftConfig, ModelConfig, SamplingConfig
from tidar_core.decoder import Decoder
from tidar_core.errors import TidarError
from tidar_core.layout import TokenLayout
from tidar_core.model import TidarModel
from tidar_core.objective import Objective
from tidar_core.request import DecodeStep, Request
from tidar_core.visibility import sees

__all__ = [
    "Batcher",
    "DecodeStep",
    "Decoder",
    "DraftConfig",
    "ModelConfig",
    "Objective",
    "Request",
    "SamplingConfig",
    "TidarError",
    "TidarModel",
    "TokenLayout",
    "generate_autoregressive",
    "sees",
]
