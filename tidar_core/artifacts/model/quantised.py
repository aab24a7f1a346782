"""Which quantised weights are read, and what float weights do they stand for?

FP8 (e4m3) with scales: one for each block of a matrix (`weight_scale_inv`, as Qwen3 and DeepSeek have it), for each
row, or for the whole (`weight_scale`, compressed-tensors' float-quantized form). Everything else is refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tidar_core.errors import WeightsError

__all__ = ["FP8", "SCALES", "Scaling", "dequantised", "scaling_of"]

FP8 = "F8_E4M3"
"""safetensors' name of the one quantised dtype that is read."""
SCALES = ("weight_scale_inv", "weight_scale")
"""Last parts of a scale's name; a weight is multiplied by either."""
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
FORMATS = ("float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "block")
READ = "this project reads float weights, and FP8 with scales for blocks, rows or tensors"


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many weights share a scale."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None: one scale for each row, or for the whole."""


def scaling_of(settings: dict[str, Any]) -> Scaling:
    """How the FP8 weights of a model with this config.json are scaled. Raises WeightsError for other quantisations."""
    given = settings.get("quantization_config") or settings.get("compression_config")
    if not given:
        return Scaling(None)
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in METHODS:
        named = repr(method) if method else f"without quant_method ({', '.join(given)})"
        raise WeightsError(f"quantization_config is {named}; {READ}: give the folder of the unquantised model")
    if method != "compressed-tensors":
        _refuse(given, "fmt", "e4m3")
        _refuse(given, "activation_scheme", "dynamic", "static")
        return Scaling(_block(given.get("weight_block_size"), "weight_block_size"))
    try:
        return Scaling(_compressed(given))
    except (AttributeError, TypeError) as error:  # objects are expected where there are none
        raise WeightsError("quantization_config is not of compressed-tensors' form; fetch the folder again") from error


def dequantised(name: str, weight: Tensor, scale: Tensor, scaling: Scaling) -> Tensor:
    """The fp32 weight that an FP8 one and its scales stand for.

    name  the weight's, for the error
    """
    rows, columns = weight.shape
    scale = scale.float()
    if scaling.block is not None:
        height, width = scaling.block
        expected = [math.ceil(rows / height), math.ceil(columns / width)]
        if list(scale.shape) != expected:
            raise _misfit(name, scale, [expected])
        scale = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif list(scale.shape) in ([rows], [rows, 1]):
        scale = scale.reshape(rows, 1)
    else:
        raise _misfit(name, scale, [[rows, 1], [1]])
    return weight.float() * scale


def _compressed(given: dict[str, Any]) -> tuple[int, int] | None:
    """The block of compressed-tensors' one scheme; None for rows and tensors."""
    _refuse(given, "format", *FORMATS)
    for name in ("kv_cache_scheme", "transform_config"):
        if given.get(name):
            raise WeightsError(f"quantization_config has {name}, which is not read; give the unquantised model")
    if (sparsity := given.get("sparsity_config")) and sparsity.get("format") not in (None, "dense"):
        raise WeightsError(f"quantization_config has sparse weights ({sparsity['format']}); give the unquantised model")
    groups = given.get("config_groups") or {}
    blocks: list[tuple[int, int] | None] = []
    for group in groups.values():
        if group.get("format") is not None:
            _refuse(group, "format", *FORMATS)
        weights = group.get("weights") or {}
        _refuse({"type": None} | weights, "type", "float")
        _refuse(weights, "num_bits", 8)
        _refuse(weights, "strategy", *STRATEGIES)
        _refuse(weights, "symmetric", True)
        blocks.append(_block(weights.get("block_structure"), "block_structure"))
    if len(set(blocks)) != 1:
        raise WeightsError(f"quantization_config has {len(blocks)} groups of weights; {READ}, in one group")
    return blocks[0]


def _block(given: Any, name: str) -> tuple[int, int] | None:
    if given is None:
        return None
    sizes = given if isinstance(given, list) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise WeightsError(
            f"quantization_config has {name} {given!r}; it must be two whole numbers, such as [128, 128]"
        )
    return given[0], given[1]


def _refuse(given: dict[str, Any], name: str, *known: Any) -> None:
    """Raise WeightsError where a key is there and has none of the known values."""
    if given.get(name, known[0]) not in known:
        raise WeightsError(
            f"quantization_config has {name} {given[name]!r}; {READ}: give the folder of the unquantised model"
        )


def _misfit(name: str, scale: Tensor, expected: list[list[int]]) -> WeightsError:
    shapes = " or ".join(map(str, expected))
    return WeightsError(
        f"the scales of {name} have shape {list(scale.shape)}; its shape and quantization_config ask for {shapes}; "
        "use weights and config of one model"
    )
