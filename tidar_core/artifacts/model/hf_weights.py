"""Models in Hugging Face folders: load, check, save, and add a mask token.

What are our weights called in such a folder, and how is a mask token added to a model?

Only `config.json` and safetensors files are read and written, so a folder opens unchanged in transformers, vLLM or
SGLang.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar_core.artifacts.model.hf_config import config_from_hf, read_settings
from tidar_core.artifacts.model.hf_files import WeightFiles, float_tensors, read_tensor
from tidar_core.artifacts.model.hf_writer import write_config, write_tensors, write_weights
from tidar_core.artifacts.model.quantised import scaling_of
from tidar_core.config import ModelConfig
from tidar_core.errors import WeightsError
from tidar_core.training.recipe import mask_embedding
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS
from tidar_core.transformer.draft_link import DraftLink
from tidar_core.transformer.model import TidarModel

__all__ = ["check_weights", "load_model", "require_embeddings", "save_model", "tensor_shapes", "with_mask_token"]

LINK = "tidar_link.tensors"
"""File with the weights of the draft link, in safetensors' format. No other program takes that name for weights."""

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
"""Our module of a layer -> Hugging Face's modules; several are stacked along the first axis in this order."""
_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mask_id: int | None = None,
) -> TidarModel:
    """Load the model of a Hugging Face folder.

    mask_id  id of the mask token, if the folder is a bundle
    """
    folder = Path(folder)
    settings = read_settings(folder)
    model = _empty_model(replace(config_from_hf(settings), mask_id=mask_id))
    files = _weight_files(folder, settings, model.config)
    state = {ours: torch.cat([files.read(name) for name in theirs]).to(device, dtype) for ours, theirs in _names(model)}
    if model.link is not None:
        state |= {f"link.{name}": value.to(device, dtype) for name, value in _read_link(folder, model.link).items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return model.eval()


def check_weights(folder: str | Path) -> ModelConfig:
    """Check by the headers of its files that `load_model` can load a folder, and return the config.

    Raises WeightsError if a tensor is missing, not used, quantised in an unsupported format, or of another shape.
    """
    settings = read_settings(folder)
    config = config_from_hf(settings)
    _weight_files(Path(folder), settings, config)
    if (link := _empty_model(config).link) is not None:
        _read_link(Path(folder), link)
    return config


def save_model(model: TidarModel, folder: str | Path, *, end_ids: Sequence[int] = ()) -> None:
    """Write config.json and model*.safetensors, in the model's dtype, into an existing folder.

    The drafts of a frozen checkpoint are left out.

    end_ids  tokens that end a text
    """
    folder = Path(folder)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    parts = {
        name: part
        for ours, theirs in _names(model)
        for name, part in zip(theirs, _parts(model, ours, parameters[ours]))
    }
    write_weights(folder, {name: part.numel() * part.element_size() for name, part in parts.items()}, parts.__getitem__)
    if model.link is not None and model.adapter is None:
        write_tensors(model.link.state_dict(), folder / LINK)
    ends = {"eos_token_id": end_ids[0] if len(end_ids) == 1 else list(end_ids)} if end_ids else {}
    write_config(folder, model.config, model.embedding.weight.dtype, ends)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by their names in a Hugging Face folder, without those of the draft link."""
    model = _empty_model(config)
    parameters = dict(model.named_parameters())
    return {
        name: tuple(part.shape)
        for ours, theirs in _names(model)
        for name, part in zip(theirs, _parts(model, ours, parameters[ours]))
    }


def require_embeddings(config: ModelConfig, vocab_len: int) -> None:
    """Raise WeightsError if the model lacks an embedding for an id of its tokenizer, 0..vocab_len - 1."""
    if vocab_len > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {vocab_len} ids and the model {config.vocab_size} embeddings; "
            "use the tokenizer of this model"
        )


def with_mask_token(model: TidarModel, vocab_len: int, *, seed: int = 0) -> TidarModel:
    """Copy a model and give it a mask token.

    The mask token takes the first id that no token of text uses. If all are used, the embedding table grows.
    Its embedding starts as the mean of the real embeddings, plus noise a tenth as wide as they are spread. For another
    start see `tidar_core.training.recipe.start_mask_token`.

    vocab_len  ids that the tokenizer can produce, 0..vocab_len - 1
    """
    old = model.config
    require_embeddings(old, vocab_len)
    grown = old.vocab_size if vocab_len < old.vocab_size else (vocab_len // 64 + 1) * 64
    weight = model.embedding.weight
    config = replace(
        old, vocab_size=grown, mask_id=vocab_len, link_rank=0
    )  # a link fits only the mask it was trained with
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


def _names(model: TidarModel) -> Iterator[tuple[str, list[str]]]:
    """Pairs of our name of a parameter and its names in Hugging Face's format, without those that draft."""
    for name, _ in model.named_parameters():
        if name.startswith(DRAFT_WEIGHTS):
            continue
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            yield name, [f"model.layers.{index}.{theirs}.{kind}" for theirs in _LAYER_NAMES[module]]
        else:
            module, kind = name.split(".")
            yield name, [f"{_TOP_NAMES[module]}.{kind}"]


def _parts(model: TidarModel, name: str, value: Tensor) -> tuple[Tensor, ...]:
    """Split a stacked parameter into Hugging Face's tensors."""
    config = model.config
    if ".attention.qkv." in name:
        heads = (config.heads, config.kv_heads, config.kv_heads)
        return value.split([n * config.head_size for n in heads])
    return value.chunk(2) if ".mlp.gate_up." in name else (value,)


def _empty_model(config: ModelConfig) -> TidarModel:
    """Build a model whose weights have shapes but no values."""
    with torch.device("meta"):
        return TidarModel(config)


def _weight_files(folder: Path, settings: dict[str, Any], config: ModelConfig) -> WeightFiles:
    """Open the folder's files, checked against the shapes of the model's tensors."""
    return WeightFiles(folder, tensor_shapes(config), scaling_of(settings), tied=config.tied_head)


def _read_link(folder: Path, link: DraftLink) -> dict[str, Tensor]:
    path, wanted = folder / LINK, {name: tuple(value.shape) for name, value in link.named_parameters()}
    found = {name: stored.shape for name, stored in float_tensors(path).items()}
    if found != wanted:
        raise WeightsError(f"{path} holds {found}; config.json needs {wanted}; use weights and config of one model")
    return {name: read_tensor(name, path) for name in wanted}
