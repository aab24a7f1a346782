"""What are our weights called in a Hugging Face model folder, and how is a mask token added to one?

Reads and writes `config.json` and safetensors files alone, so that a folder opens unchanged in transformers, vLLM or
SGLang; both ways of writing rotary parameters (transformers 4 and 5) are read.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tidar_core.config import ModelConfig, RopeScaling
from tidar_core.errors import WeightsError
from tidar_core.model import TidarModel
from tidar_core.recipe import mask_embedding

__all__ = ["config_from_hf", "config_to_hf", "load_model", "require_rows", "save_model", "with_mask_token"]

LINK = "tidar_link.tensors"
"""Weights of the draft link, in safetensors' format; under a name that no one else takes for a part of the model."""
LINK_RANK = "tidar_link_rank"
"""Our one entry in config.json, where there is a link."""
FILE_BYTES = 5 * 10**9
"""Largest safetensors file written."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_LAYER_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
"""Our module in a layer -> theirs; several are stacked along the first axis in this order."""
_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mask_id: int | None = None,
) -> TidarModel:
    """The model in a Hugging Face folder.

    mask_id  the mask token's row, where the folder is one of ours
    """
    folder = Path(folder)
    config = replace(config_from_hf(_read_json(folder / "config.json")), mask_id=mask_id)
    with torch.device("meta"):
        model = TidarModel(config)
    read = _reader(folder)
    state = {ours: torch.cat([read(name) for name in theirs]).to(device, dtype) for ours, theirs in _names(model)}
    if model.link is not None:
        state |= {f"link.{name}": value.to(device, dtype) for name, value in _read_link(folder).items()}
    for name, expected in model.state_dict().items():
        if name in state and state[name].shape != expected.shape:
            raise WeightsError(
                f"{folder}: weight {name} has shape {list(state[name].shape)}; config.json asks for "
                f"{list(expected.shape)}; use weights and config of one model"
            )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return model.eval()


def save_model(model: TidarModel, folder: str | Path, *, eos_id: int | None = None) -> None:
    """Write config.json and model*.safetensors, in the model's dtype, into an existing folder."""
    folder = Path(folder)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    settings = config_to_hf(model.config) | {"dtype": dtype, "torch_dtype": dtype}
    if eos_id is not None:
        settings["eos_token_id"] = eos_id
    files = list(_files(model))
    for number, tensors in enumerate(files, 1):
        save_file(tensors, folder / _file_name(number, len(files)), metadata={"format": "pt"})
    if model.link is not None:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in model.link.state_dict().items()}, folder / LINK
        )
    if len(files) > 1:
        places = {name: _file_name(i, len(files)) for i, tensors in enumerate(files, 1) for name in tensors}
        total = sum(t.numel() * t.element_size() for tensors in files for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def require_rows(config: ModelConfig, vocab_len: int) -> None:
    """Raise WeightsError where the model has no row for some id of its tokenizer, 0..vocab_len - 1."""
    if vocab_len > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {vocab_len} ids and the model {config.vocab_size} rows; use the tokenizer of this model"
        )


def with_mask_token(model: TidarModel, vocab_len: int, *, seed: int = 0) -> TidarModel:
    """The same model with a mask token: the first row that no token of text uses, or new rows where there is none.

    vocab_len  ids that the tokenizer can produce, 0..vocab_len - 1

    Its embedding starts as the mean of the real ones, plus noise a tenth as wide as they are spread; for another start
    see `tidar_core.recipe.start_mask_token`.
    """
    old = model.config
    require_rows(old, vocab_len)
    grown = old.vocab_size if vocab_len < old.vocab_size else (vocab_len // 64 + 1) * 64
    weight = model.embedding.weight
    config = replace(old, vocab_size=grown, mask_id=vocab_len, link_rank=0)  # a link belongs to masks that were trained
    with torch.device(weight.device):
        new = TidarModel(config).to(weight.dtype)
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith(("embedding", "head", "link"))
    }
    new.load_state_dict(state, strict=False)
    tables = [(new.embedding.weight, weight)]
    if not config.tied_head:
        tables.append((new.head.weight, model.head.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table, old_table in tables:
            real = old_table[:vocab_len].float()
            noise = torch.randn(grown, old.hidden_size, generator=generator).to(weight.device)
            table.copy_(mask_embedding(real, "mean", noise))
            table[: old.vocab_size] = old_table
            table[vocab_len] = mask_embedding(real, "mean", noise[vocab_len]).to(table.dtype)
    return new.train(model.training)


def config_from_hf(settings: dict[str, Any]) -> ModelConfig:
    """Our config from a config.json; WeightsError for architectures and features that are not run here."""
    kind = settings.get("model_type")
    if kind not in CLASSES:
        raise WeightsError(f"model_type is {kind!r}; this project runs {', '.join(CLASSES)}")
    sliding = "sliding_attention" in (settings.get("layer_types") or ())
    if settings.get("use_sliding_window") or sliding:
        raise WeightsError("the model uses sliding-window attention; this project runs full attention only")
    if settings.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"hidden_act is {settings['hidden_act']!r}; this project runs silu")
    heads, hidden_size = settings["num_attention_heads"], settings["hidden_size"]
    bias = bool(settings.get("attention_bias", False))
    return ModelConfig(
        architecture=kind,
        vocab_size=settings["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=settings["intermediate_size"],
        layers=settings["num_hidden_layers"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_size=settings.get("head_dim") or hidden_size // heads,
        context_len=settings["max_position_embeddings"],
        rope_theta=float(_rope(settings).get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(settings),
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        output_bias=kind != "qwen2" and bias,
        mlp_bias=kind == "llama" and bool(settings.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        link_rank=settings.get(LINK_RANK, 0),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike; the mask token is not in it."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = scaling.original_context_len
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            rope |= {"attention_factor": scaling.attention_factor}
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
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "bos_token_id": None,
    }
    if config.rope_scaling is not None:
        settings["rope_scaling"] = rope
    if config.architecture != "qwen2":
        settings["attention_bias"] = config.qkv_bias
    if config.architecture == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if config.link_rank:
        settings[LINK_RANK] = config.link_rank
    return settings


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, transformers 5's `rope_parameters` over 4's `rope_scaling` and `rope_theta`."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return ({"rope_theta": settings["rope_theta"]} if "rope_theta" in settings else {}) | given


def _rope_scaling(settings: dict[str, Any]) -> RopeScaling | None:
    rope = _rope(settings)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise WeightsError(f"rope_type is {kind!r}; this project runs default, linear, llama3 and yarn")
    if kind == "yarn" and (rope.get("mscale") or rope.get("truncate") is False):
        raise WeightsError("yarn with mscale or truncate: false is not run here; remove them or choose another model")
    factor = float(rope["factor"])
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0  # YaRN, section 3.4
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context_len=int(rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=float(attention_factor) if kind == "yarn" else 1.0,
    )


def _names(model: TidarModel) -> Iterator[tuple[str, list[str]]]:
    """Our name of each parameter that they know -> theirs."""
    for name, _ in model.named_parameters():
        if name.startswith("link."):
            continue
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            yield name, [f"model.layers.{index}.{theirs}.{kind}" for theirs in _LAYER_NAMES[module]]
        else:
            module, kind = name.split(".")
            yield name, [f"{_TOP_NAMES[module]}.{kind}"]


def _parts(model: TidarModel, name: str, value: Tensor) -> tuple[Tensor, ...]:
    """A stacked parameter cut into theirs."""
    config = model.config
    if ".attention.qkv." in name:
        heads = (config.heads, config.kv_heads, config.kv_heads)
        return value.split([n * config.head_size for n in heads])
    return value.chunk(2) if ".mlp.gate_up." in name else (value,)


def _files(model: TidarModel) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    held = 0
    parameters = dict(model.named_parameters())
    for ours, theirs in _names(model):
        value = parameters[ours].detach()
        size = value.numel() * value.element_size()
        if tensors and held + size > FILE_BYTES:
            yield tensors
            tensors, held = {}, 0
        tensors |= {name: part.cpu().contiguous() for name, part in zip(theirs, _parts(model, ours, value))}
        held += size
    yield tensors


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _reader(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads one of their tensors by name, from one file or many."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists() and not single.exists():
        raise WeightsError(f"{folder} has no model.safetensors; give a folder with safetensors weights")
    places = _read_json(index)["weight_map"] if index.exists() else {}

    def read(name: str) -> Tensor:
        path = folder / places[name] if name in places else single
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: weight {name} cannot be read ({error}); fetch the folder again") from error

    return read


def _read_link(folder: Path) -> dict[str, Tensor]:
    path = folder / LINK
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("before", "after")}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); fetch the folder again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read; give the folder of a Hugging Face model") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch the folder again") from error
