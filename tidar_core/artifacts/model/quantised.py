"""Dequantisation of FP8 weights, and refusal of other quantised weights.

Which quantised weights are read, and which float weights do they represent?

FP8 (e4m3) is read, with a scale for each

- block of a matrix: `weight_scale_inv`, as in Qwen3 and DeepSeek
- output channel or whole matrix: `weight_scale`, compressed-tensors' float-quantized form

Everything else is refused by name.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidar_core.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP8", "SCALES", "Scaling", "dequantised", "is_quantised", "scaling_of"]

FP8 = "F8_E4M3"
"""Name in safetensors of the only quantised dtype that is read."""
SCALES = ("weight_scale_inv", "weight_scale")
"""Last parts of a scale's name. Both kinds multiply the weight, `weight_scale_inv` too."""
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
FORMATS = ("float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "block")
READ = "this project reads float weights, and FP8 with scales for blocks, channels or tensors"


@dataclass(frozen=True, slots=True)
class Scaling:
    """Weights that share a scale."""

    block: tuple[int, int] | None
    """Outputs and inputs of a block; None: a scale for each output channel, or for the whole matrix."""


def is_quantised(settings: dict[str, Any]) -> bool:
    """Whether the weights of a model with this config.json have fewer bits than 16."""
    return bool(_quantisation(settings))


def scaling_of(settings: dict[str, Any]) -> Scaling:
    """Scaling of the FP8 weights of a model with this config.json. Raises WeightsError for other quantisations."""
    given = _quantisation(settings)
    if not given:
        return Scaling(None)
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in METHODS:
        named = repr(method) if method else f"without quant_method ({', '.join(given)})"
        raise WeightsError(f"quantization_config is {named}; {READ}; give the folder of the unquantised model")
    if method != "compressed-tensors":
        _refuse(given, "fmt", "e4m3")
        _refuse(given, "activation_scheme", "dynamic", "static")
        return Scaling(_block(given.get("weight_block_size"), "weight_block_size"))
    try:
        return Scaling(_compressed(given))
    except (AttributeError, TypeError) as error:  # a value is not the object that is expected
        raise WeightsError("quantization_config is not of compressed-tensors' form; fetch the folder again") from error


def dequantised(name: str, weight: "Tensor", scale: "Tensor", scaling: Scaling) -> "Tensor":
    """Return the fp32 weight that an FP8 weight and its scales represent.

    name  name of the weight, for the error
    """
    outputs, inputs = weight.shape
    scale = scale.float()
    if scaling.block is not None:
        height, width = scaling.block
        expected = [math.ceil(outputs / height), math.ceil(inputs / width)]
        if list(scale.shape) != expected:
            raise _misfit(name, scale, [expected])
        scale = scale.repeat_interleave(height, 0)[:outputs].repeat_interleave(width, 1)[:, :inputs]
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif list(scale.shape) in ([outputs], [outputs, 1]):
        scale = scale.reshape(outputs, 1)
    else:
        raise _misfit(name, scale, [[outputs, 1], [1]])
    return weight.float() * scale


def _compressed(given: dict[str, Any]) -> tuple[int, int] | None:
    """Block of the only scheme of a compressed-tensors config; None for scales of channels and tensors."""
    _refuse(given, "format", *FORMATS)
    for name in ("kv_cache_scheme", "transform_config"):
        if given.get(name):
            raise WeightsError(f"quantization_config has {name}, which is not supported; give the unquantised model")
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
    """Raise WeightsError if a key is present and its value is not known."""
    if given.get(name, known[0]) not in known:
        raise WeightsError(
            f"quantization_config has {name} {given[name]!r}; {READ}; give the folder of the unquantised model"
        )


def _misfit(name: str, scale: "Tensor", expected: list[list[int]]) -> WeightsError:
    shapes = " or ".join(map(str, expected))
    return WeightsError(
        f"the scales of {name} have shape {list(scale.shape)}; its shape and quantization_config need {shapes}; "
        "use weights and config of one model"
    )


def _quantisation(settings: dict[str, Any]) -> Any:
    return settings.get("quantization_config") or settings.get("compression_config")
