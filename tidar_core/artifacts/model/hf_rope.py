"""Rotary keys of a config.json.

Which rotary frequencies do they define?

The order of precedence is that of transformers 5:

- `rope_scaling` comes before `rope_parameters`
- a theta within them comes before `rope_theta` at the top
- `original_max_position_embeddings` at the top comes before the same key within them
"""

import math
from dataclasses import dataclass
from typing import Any

from tidar_core.config import ModelConfig, RopeScaling
from tidar_core.errors import WeightsError

__all__ = ["Rope", "rope_of", "rope_settings"]

KINDS = ("default", "linear", "llama3", "yarn")
THETA = 10_000.0
"""Theta if no key gives another."""
ORIGINAL_LEN = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies of a model."""

    theta: float
    scaling: RopeScaling | None


def rope_of(settings: dict[str, Any], context_len: int) -> Rope:
    """Read the rotary keys of a config.json. Raises WeightsError for unsupported keys and values.

    context_len  max_position_embeddings
    """
    given = _given(settings)
    theta = _number({"rope_theta": THETA} | settings | given, "rope_theta", above=0)
    kind = given.get("rope_type") or given.get("type")
    if kind is None and given.get("factor") is not None:
        raise WeightsError(f"rotary parameters have factor {given['factor']!r} and no rope_type; name the rope_type")
    kind = kind or "default"
    if kind not in KINDS:
        raise WeightsError(f"rope_type is {kind!r}; this project supports {', '.join(KINDS)}")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise WeightsError(
            f"partial_rotary_factor is {given['partial_rotary_factor']!r}, which is not supported; choose another model"
        )
    if kind == "default":
        return Rope(theta, None)
    original = settings.get(ORIGINAL_LEN) or given.get(ORIGINAL_LEN) or context_len
    original_len = _number({ORIGINAL_LEN: original}, ORIGINAL_LEN, above=1)
    if kind == "yarn":
        return Rope(theta, _yarn(given, original_len, context_len))
    low, high = 1.0, 4.0
    if kind == "llama3":
        low, high = _number(given, "low_freq_factor", above=0), _number(given, "high_freq_factor", above=0)
        if high <= low:
            raise WeightsError(f"rope high_freq_factor is {high} and low_freq_factor {low}; the first must be larger")
    scaling = RopeScaling(
        kind=kind,
        factor=_number(given, "factor", above=0),
        original_context_len=int(original_len),
        low_freq_factor=low,
        high_freq_factor=high,
    )
    return Rope(theta, scaling)


def rope_settings(config: ModelConfig) -> dict[str, Any]:
    """Rotary keys of a config.json, in both forms that transformers reads."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope[ORIGINAL_LEN] = scaling.original_context_len
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            rope |= {"attention_factor": scaling.attention_factor}
    older = {} if config.rope_scaling is None else {"rope_scaling": rope}
    return {
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        **older,
    }


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters that have precedence."""
    for name in ("rope_scaling", "rope_parameters"):
        value = settings.get(name)
        if value is not None and not isinstance(value, dict):
            raise WeightsError(f"config.json has {name} {value!r}; it must be an object; use the model's own")
        for layer_type, part in (value or {}).items():
            if isinstance(part, dict):
                raise WeightsError(
                    f"{name} differs by layer type ({layer_type!r}); this project supports one kind of rotary embedding"
                )
    older, newer = settings.get("rope_scaling") or {}, settings.get("rope_parameters") or {}
    theta = newer.get("rope_theta")
    if older and "rope_theta" not in older and "rope_theta" not in settings and theta not in (None, THETA):
        raise WeightsError(
            f"rope_scaling replaces rope_parameters, whose rope_theta {theta} is lost; put rope_theta into "
            "rope_scaling, or all of it into rope_parameters"
        )
    return older or newer


def _yarn(given: dict[str, Any], original_len: float, context_len: int) -> RopeScaling:
    """Read YaRN's keys. A null factor is context_len / original_len; attention_factor follows (YaRN, section 3.4)."""
    if not given.get("truncate", True):
        raise WeightsError("yarn with truncate: false is not supported; remove it or choose another model")
    if "factor" in given and given["factor"] is None:
        factor = context_len / original_len
    else:
        factor = _number(given, "factor", above=0)
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = _stretch(factor, 1.0)
        if given.get("mscale") and given.get("mscale_all_dim"):
            over, under = (_number(given, name, above=0) for name in ("mscale", "mscale_all_dim"))
            attention_factor = _stretch(factor, over) / _stretch(factor, under)
    betas = {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_len=int(original_len),
        beta_fast=_number(betas, "beta_fast", above=0),
        beta_slow=_number(betas, "beta_slow", above=0),
        attention_factor=_number({"attention_factor": attention_factor}, "attention_factor", above=0),
    )


def _stretch(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(given: dict[str, Any], name: str, *, above: float) -> float:
    value = given.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        stated = f"{name} {value!r}" if name in given else f"no {name}"
        raise WeightsError(
            f"rotary parameters of config.json have {stated}; it must be a number above {above:g}; use the model's own"
        )
    return float(value)
