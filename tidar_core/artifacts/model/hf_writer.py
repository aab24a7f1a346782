"""Writer of a Hugging Face model folder, which holds the tensors of one file in memory at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tidar_core.artifacts.model.hf_config import config_to_hf
from tidar_core.artifacts.model.hf_files import INDEX, SINGLE
from tidar_core.config import ModelConfig
from tidar_core.errors import StorageError

__all__ = ["write_config", "write_tensors", "write_weights"]

FILE_BYTES = 5 * 10**9
"""Most bytes of weights in a safetensors file, unless one tensor is larger."""


def write_config(folder: Path, config: ModelConfig, dtype: torch.dtype, token_ids: Mapping[str, Any]) -> None:
    """Write config.json.

    dtype      dtype of the weights in the folder
    token_ids  eos_token_id and the like
    """
    name = str(dtype).removeprefix("torch.")
    settings = config_to_hf(config) | {"dtype": name, "torch_dtype": name} | dict(token_ids)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_weights(folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
    """Write model*.safetensors, and an index if there are several files.

    sizes  bytes of each tensor by its name, in the order of the files
    read   returns a tensor; it is called once for each name, before the tensor's file is written
    """
    groups = list(_groups(sizes))
    files = [SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
             for i in range(1, len(groups) + 1)]  # fmt: skip
    for file, names in zip(files, groups):
        write_tensors({name: read(name) for name in names}, folder / file)
    if len(groups) > 1:
        places = {name: file for file, names in zip(files, groups) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, with the rights of any new file. Raises StorageError if the disk refuses it."""
    path.touch()
    rights = path.stat().st_mode
    try:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(rights)  # safetensors lets the owner alone read its files
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{path} cannot be written: {reason}; make room there, or give another place") from error


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > FILE_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names
