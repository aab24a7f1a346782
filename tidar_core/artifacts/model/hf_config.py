"""Translation between a config.json of Hugging Face and `ModelConfig`.

How does each become the other?

Every key that changes a result is used or refused. A missing key has the value that transformers 5 gives it. Mistral's
models without a sliding window are read as models of the Llama family.
"""

import math
from pathlib import Path
from typing import Any

from tidar_core.artifacts.model.hf_rope import rope_of, rope_settings
from tidar_core.artifacts.model.quantised import scaling_of
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.json_object import json_object
from tidar_core.config import ModelConfig
from tidar_core.errors import WeightsError

__all__ = ["config_from_hf", "config_to_hf", "read_config", "read_settings"]

LINK_RANK = "tidar_link_rank"
"""The only key that this project adds to config.json; present if the model has a draft link."""
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""num_key_value_heads if the key is missing. Other families, and a null, have as many as heads."""
HEAD_SIZES = {"qwen3": 128}
"""head_dim if the key is missing. Other families have hidden size / heads."""
WINDOWS = {"mistral": 4096}
"""sliding_window if the key is missing."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_scale": (1,),
    "attn_logit_softcapping": (0,),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "logits_soft_cap": (0,),
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({}, []),
    "pruned_heads": ({}, []),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_mrope": (False,),
}
"""Keys of unsupported features, with the values besides null that change nothing."""
MOST = {
    "max_position_embeddings": 2**31 - 1, "num_hidden_layers": 2**10, "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14, "head_dim": 2**14,
}  # fmt: skip
MOST_OTHERWISE = 2**27
"""Largest sizes that are read. A model of more layers would be built for minutes before its weights are compared."""


def read_config(folder: str | Path) -> ModelConfig:
    """Read the config of the model in a folder, without its mask token."""
    return config_from_hf(read_settings(folder))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read the keys of config.json in a folder. Raises WeightsError if it is missing or not a JSON object."""
    where = locations.join(str(folder), "config.json")
    if not locations.exists(where):
        raise WeightsError(f"{where} cannot be read; give the folder of a Hugging Face model")
    return json_object(where, locations.read_bytes(where))


def config_from_hf(settings: dict[str, Any]) -> ModelConfig:
    """Translate a config.json. Raises WeightsError for architectures and features that are not supported."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise WeightsError(f"model_type is {kind!r}; this project supports {', '.join(CLASSES)}")
    _require_class(settings, kind)
    scaling_of(settings)
    for name, values in NEUTRAL.items():
        given = settings.get(name)
        if given is not None and given not in values:
            raise WeightsError(f"config.json has {name} {given!r}, which is not supported; choose another model")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise WeightsError(f"hidden_act is {settings['hidden_act']!r}; this project supports silu")
    layers, context_len = _whole(settings, "num_hidden_layers"), _whole(settings, "max_position_embeddings")
    heads, hidden_size = _whole(settings, "num_attention_heads"), _whole(settings, "hidden_size")
    _refuse_window(settings, kind, layers, context_len)
    rope = rope_of(settings, context_len)
    bias = _flag(settings, "attention_bias")
    return ModelConfig(
        architecture="llama" if kind == "mistral" else kind,
        vocab_size=_whole(settings, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(settings, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(settings, kind, heads),
        head_size=_head_size(settings, kind, hidden_size, heads),
        context_len=context_len,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=_norm_eps(settings),
        tied_head=_flag(settings, "tie_word_embeddings"),
        qkv_bias=kind == "qwen2" or (bias and kind != "mistral"),
        output_bias=bias and kind in ("llama", "qwen3"),
        mlp_bias=kind == "llama" and _flag(settings, "mlp_bias"),
        qk_norm=kind == "qwen3",
        link_rank=_whole({LINK_RANK: 0} | settings, LINK_RANK, least=0),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate to a config.json that transformers 4 and 5 read alike; it does not contain the mask token."""
    settings = {
        "architectures": [CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "bos_token_id": None,
        **rope_settings(config),
    }
    if config.architecture != "qwen2":
        settings["attention_bias"] = config.qkv_bias
    if config.architecture == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if config.link_rank and config.adapter is None:
        settings[LINK_RANK] = config.link_rank
    return settings


def _whole(settings: dict[str, Any], name: str, *, least: int = 1) -> int:
    """Return the whole number of a key. Raises WeightsError if the key has none."""
    value, most = settings.get(name), MOST.get(name, MOST_OTHERWISE)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        given = f"{name} {value!r}" if name in settings else f"no {name}"
        raise WeightsError(
            f"config.json has {given}; it must be a whole number, {least} to {most}; use the model's own"
        )
    return value


def _flag(settings: dict[str, Any], name: str) -> bool:
    """Return the truth value of a key; a missing key and a null are false. Raises WeightsError for another value."""
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(f"config.json has {name} {value!r}; it must be true or false; use the model's own")
    return bool(value)


def _require_class(settings: dict[str, Any], kind: str) -> None:
    given = settings.get("architectures")
    if given is None:
        return
    names = [str(name).casefold() for name in given] if isinstance(given, list) else []
    if CLASSES[kind].casefold() not in names:
        raise WeightsError(
            f"config.json has architectures {given!r} and model_type {kind!r}; {CLASSES[kind]} is needed; "
            "use a model that generates text, with its own config.json"
        )


def _refuse_window(settings: dict[str, Any], kind: str, layers: int, context_len: int) -> None:
    """Raise WeightsError if a layer attends to less than the whole context, or in another manner."""
    window = settings.get("sliding_window", WINDOWS.get(kind))
    shortened = _flag(settings, "use_sliding_window") or (kind in ("llama", "mistral") and window is not None)
    if (names := settings.get("layer_types")) is not None:
        _require_layer_types(names, layers)
        shortened = shortened or "sliding_attention" in names
    if shortened and not (isinstance(window, int) and window >= context_len):
        raise WeightsError(
            f"the model uses sliding-window attention over {window} tokens of {context_len}; this project supports "
            "full attention only; lower max_position_embeddings to the window, or choose another model"
        )


def _require_layer_types(given: Any, layers: int) -> None:
    known = ("full_attention", "sliding_attention")
    names = given if isinstance(given, list) else [given]
    if other := [name for name in names if name not in known]:
        raise WeightsError(
            f"layer_types has {other[0]!r}; this project supports full attention only; use another model"
        )
    if len(names) != layers:
        raise WeightsError(f"layer_types names {len(names)} layers and num_hidden_layers is {layers}; make them equal")


def _kv_heads(settings: dict[str, Any], kind: str, heads: int) -> int:
    value = settings.get("num_key_value_heads", KV_HEADS.get(kind))
    return heads if value is None else _whole({"num_key_value_heads": value}, "num_key_value_heads")


def _head_size(settings: dict[str, Any], kind: str, hidden_size: int, heads: int) -> int:
    value = settings.get("head_dim")
    if value is None:
        value = HEAD_SIZES.get(kind)
    if value is not None:
        return _whole({"head_dim": value}, "head_dim")
    if hidden_size % heads:
        raise WeightsError(
            f"config.json has hidden_size {hidden_size} and num_attention_heads {heads}; without head_dim the first "
            "must be a multiple of the second"
        )
    return hidden_size // heads


def _norm_eps(settings: dict[str, Any]) -> float:
    value = settings.get("rms_norm_eps", 1e-6)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise WeightsError(f"config.json has rms_norm_eps {value!r}; it must be a number; use the model's own")
    return float(value)
