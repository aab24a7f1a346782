"""Translation of the models in GGUF files to Hugging Face's format.

Which config and which tensors does a file hold?

llama.cpp rotates neighbouring pairs of a head in the architecture `llama`, and Hugging Face the two halves. Files of
`llama` hold the rows of q and k in llama.cpp's order. Files of Qwen2 and Qwen3 differ in names alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidar_core.artifacts.model.gguf_file import GgufFile
from tidar_core.artifacts.model.hf_config import config_from_hf
from tidar_core.artifacts.model.hf_weights import tensor_shapes
from tidar_core.config import ModelConfig, RopeScaling
from tidar_core.errors import WeightsError
from tidar_core.transformer.model import rotary_frequencies

__all__ = ["GgufModel"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PERMUTED = "llama"
"""The architecture whose q and k have llama.cpp's order of rows."""
EMBEDDING, HEAD, ROPE_DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's module -> GGUF's."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
READ = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)  # fmt: skip
"""Keys of an architecture that `_settings` reads."""
SILENT = ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")
"""Keys that change nothing. The vocabulary's size is that of its table, which may be padded."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "use_parallel_residual": (False,),
}
"""Keys of unsupported features, with the values that change nothing."""
SCALING_KEYS = {
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Hugging Face's key -> GGUF's."""
LLAMA3_FACTORS = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every published Llama. Frequencies depend on their ratios to the original
context alone."""
LLAMA3_CONTEXTS = (8192, *(2**power for power in range(4, 21)))
"""Original contexts that are tried if the file states none."""


class GgufModel:
    """The model in a GGUF file: its config, and its tensors under Hugging Face's names."""

    def __init__(self, file: GgufFile) -> None:
        """Translate the metadata. Raises WeightsError for what this project does not run, and for missing tensors."""
        self._file = file
        if file.architecture not in ARCHITECTURES:
            raise WeightsError(
                f"{file.path} has architecture {file.architecture!r}; {', '.join(ARCHITECTURES)} are supported; use "
                "another model"
            )
        try:
            config = config_from_hf(_settings(file))
        except WeightsError as error:
            raise WeightsError(f"{file.path}, as a config.json: {error}") from error
        if ROPE_DIVISORS in file.names:
            config = replace(config, rope_scaling=_llama3(file, config))
        self.config: ModelConfig = config
        """The model's config, without a mask token."""
        _refuse_other_keys(file, self.config)
        self._shapes = tensor_shapes(self.config)
        self._require_tensors()
        self.dtype = self._exact_dtype()
        """The smallest dtype that holds every value exactly."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor in `dtype`, by Hugging Face's name."""
        return {name: math.prod(shape) * self.dtype.itemsize for name, shape in self._shapes.items()}

    def read(self, name: str) -> Tensor:
        """Read a tensor in `dtype`, with its rows in Hugging Face's order."""
        value = self._file.read(_gguf_name(name)).to(self.dtype)
        if self._file.architecture == PERMUTED and ".q_proj." in name:
            return _in_halves(value, self.config.heads)
        if self._file.architecture == PERMUTED and ".k_proj." in name:
            return _in_halves(value, self.config.kv_heads)
        return value

    def _require_tensors(self) -> None:
        file, wanted = self._file, {_gguf_name(name): shape for name, shape in self._shapes.items()}
        if missing := sorted(wanted.keys() - file.names):
            raise WeightsError(f"{file.path} lacks {_some(missing)} of its architecture; fetch the file again")
        if left := sorted(file.names - wanted.keys() - {ROPE_DIVISORS}):
            raise WeightsError(f"{file.path} holds {_some(left)}, which {file.architecture} has not; use another model")
        for name, shape in wanted.items():
            if file.shape(name) != shape:
                raise WeightsError(
                    f"{file.path}: tensor {name} has shape {list(file.shape(name))}; its metadata need {list(shape)}; "
                    "fetch the file again"
                )

    def _exact_dtype(self) -> torch.dtype:
        types = {name: self._file.type_of(name) for name in map(_gguf_name, self._shapes)}
        half = {kind for name, kind in types.items() if len(self._file.shape(name)) > 1}
        if len(half) != 1 or not half <= DTYPES.keys():
            return torch.float32
        dtype = DTYPES[half.pop()]
        rest = (self._file.read(name) for name, kind in types.items() if DTYPES.get(kind) != dtype)  # norms and biases
        return dtype if all(torch.equal(value.to(dtype).float(), value.float()) for value in rest) else torch.float32


def _settings(file: GgufFile) -> dict[str, Any]:
    """The keys of a config.json that describe the file's model."""
    if EMBEDDING not in file.names:
        raise WeightsError(f"{file.path} lacks tensor {EMBEDDING}; fetch the file again")
    heads = _number(file, "attention.head_count")
    hidden_size = _number(file, "embedding_length")
    return {
        "model_type": file.architecture,
        "vocab_size": file.shape(EMBEDDING)[0],
        "hidden_size": hidden_size,
        "intermediate_size": _number(file, "feed_forward_length"),
        "num_hidden_layers": _number(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": _number(file, "attention.key_length", hidden_size // max(1, heads)),
        "max_position_embeddings": _number(file, "context_length"),
        "rms_norm_eps": _shortest(_number(file, "attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": HEAD not in file.names,
        "attention_bias": "blk.0.attn_q.bias" in file.names,
        "mlp_bias": "blk.0.ffn_up.bias" in file.names,
        "rope_parameters": _rope(file),
    }


def _rope(file: GgufFile) -> dict[str, Any]:
    kind = _value(file, "rope.scaling.type")
    if kind is None:  # llama.cpp scales linearly then
        kind = "linear" if f"{file.architecture}.rope.scaling.factor" in file.fields else "none"
    given = {"rope_type": "default", "rope_theta": _shortest(_number(file, "rope.freq_base", 10_000.0))}
    if kind == "none":
        return given
    if ROPE_DIVISORS in file.names:
        raise WeightsError(f"tensor {ROPE_DIVISORS} and rope scaling {kind!r} exclude each other; use another file")
    given |= {"rope_type": kind, "factor": _shortest(_number(file, "rope.scaling.factor"))}
    for ours, theirs in SCALING_KEYS.items():
        if f"{file.architecture}.rope.scaling.{theirs}" in file.fields:
            given[ours] = _shortest(_number(file, f"rope.scaling.{theirs}"))
    return given


def _llama3(file: GgufFile, config: ModelConfig) -> RopeScaling | None:
    """Llama 3's scaling with the divisors of frequencies that the file holds; None if all are 1.

    Raises WeightsError if no parameters give these divisors.
    """
    divisors = file.read(ROPE_DIVISORS).float()
    frequency, _ = rotary_frequencies(config)
    if divisors.shape != frequency.shape:
        raise WeightsError(
            f"{file.path}: {ROPE_DIVISORS} has shape {list(divisors.shape)}; a divisor for each frequency is needed, "
            f"{list(frequency.shape)}; fetch the file again"
        )
    if bool((divisors == 1).all()):
        return None
    stated = _number(file, "rope.scaling.original_context_length", 0)
    low, high = LLAMA3_FACTORS
    for original in filter(None, (stated, *LLAMA3_CONTEXTS)):
        scaling = RopeScaling(
            kind="llama3", factor=max(1.0, _shortest(float(divisors.max()))), original_context_len=int(original),
            low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip
        scaled, _ = rotary_frequencies(replace(config, rope_scaling=scaling))
        if torch.allclose(frequency / scaled, divisors, rtol=1e-4, atol=0):
            return scaling
    raise WeightsError(
        f"{file.path}: no parameters of llama3 give the divisors in {ROPE_DIVISORS}; use the model's own safetensors"
    )


def _refuse_other_keys(file: GgufFile, config: ModelConfig) -> None:
    """Raise WeightsError for a key of the architecture that this project does not run."""
    sizes = (config.head_size,)
    neutral = NEUTRAL | {"rope.dimension_count": sizes, "attention.value_length": sizes}
    prefix = f"{file.architecture}."
    for key, value in file.fields.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in READ or name in SILENT or value in neutral.get(name, ()):
            continue
        if name == "attention.sliding_window" and isinstance(value, int) and value >= config.context_len:
            continue
        raise WeightsError(f"{file.path} has {key} {value!r}, which is not supported; use another model")


def _value(file: GgufFile, name: str, default: Any = None) -> Any:
    """The value of a key of the architecture. A list of equal values, one for each layer, counts as the value."""
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if isinstance(value, list) and value and value == value[:1] * len(value):
        return value[0]
    return value


def _number(file: GgufFile, name: str, default: Any = None) -> Any:
    """A number of the architecture. Raises WeightsError if it is missing or differs by layer."""
    value = _value(file, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        given = "no" if value is None else f"{value!r} as"
        raise WeightsError(f"{file.path} has {given} {file.architecture}.{name}; a number is needed; use another file")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to a value of 32 bits: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _in_halves(value: Tensor, heads: int) -> Tensor:
    """Rows of a head from pairs (0, D/2, 1, D/2 + 1, ..) to halves (0, 1, .., D/2, ..)."""
    pairs = value.view(heads, len(value) // heads // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def _gguf_name(name: str) -> str:
    """GGUF's name of a tensor that has a Hugging Face name."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def _some(names: Sequence[str]) -> str:
    return f"tensor {names[0]}" + (f" and {len(names) - 1} others" if len(names) > 1 else "")
