"""Weight files of a Hugging Face model folder, checked against the tensors that a model needs.

Which tensors does a folder hold, and are they the whole model and nothing else?

`model.safetensors` has priority over an index of several files, as in transformers. Until a tensor is read, only the
headers of the files are.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tidar_core.artifacts.model.quantised import FP8, SCALES, Scaling, dequantised
from tidar_core.artifacts.store.json_object import json_object
from tidar_core.errors import WeightsError

__all__ = ["Stored", "WeightFiles", "float_tensors", "read_tensor", "stored_tensors", "weight_files"]

SUFFIX = ".safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
SCALE_DTYPES = (*FLOATS, "F8_E8M0")
BUFFERS = ".rotary_emb.inv_freq"
"""Suffix of buffers that older versions of transformers saved. Their values follow from config.json."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """Header of a tensor in a file."""

    path: Path
    dtype: str
    """Spelled as in safetensors: F32, BF16, F8_E4M3, I8."""
    shape: tuple[int, ...]


class WeightFiles:
    """Tensors of a folder, checked against the tensors of a model."""

    def __init__(self, folder: Path, wanted: Mapping[str, Sequence[int]], scaling: Scaling, *, tied: bool) -> None:
        """wanted   shapes of the model's tensors by their names in the folder
        scaling  how FP8 weights are scaled
        tied     whether the head is the embedding table

        Raises WeightsError if a tensor is missing, has another shape or an unsupported dtype, or is not used.
        """
        self._folder, self._scaling = folder, scaling
        self._stored = stored_tensors(folder)
        self._scale_of: dict[str, str] = {}
        """Name of an FP8 weight -> name of its scales."""
        self._require(wanted)
        used = {*wanted, *self._scale_of.values()}
        left = [name for name in self._stored if name not in used and not name.endswith(BUFFERS)]
        if tied and HEAD in left:
            left.remove(HEAD)
            self._require_equal_head()
        if left:
            raise WeightsError(
                f"{folder}: {_named(left)} of the checkpoint {'is' if len(left) == 1 else 'are'} not part of the model "
                "that config.json describes; use weights and config of one model, neither quantised nor extended"
            )
        if self._scale_of:
            logger.warning(
                "%s: %d FP8 weights are dequantised; the model is trained, saved and decoded in floats",
                folder, len(self._scale_of),
            )  # fmt: skip

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model, in fp32 if it was quantised."""
        value = read_tensor(name, self._stored[name].path)
        if name not in self._scale_of:
            return value
        scales = self._scale_of[name]
        return dequantised(name, value, read_tensor(scales, self._stored[scales].path), self._scaling)

    def _require(self, wanted: Mapping[str, Sequence[int]]) -> None:
        if missing := [name for name in wanted if name not in self._stored]:
            raise WeightsError(
                f"{self._folder}: {_named(missing)} of the model that config.json describes "
                f"{'is' if len(missing) == 1 else 'are'} missing; use weights and config of one model"
            )
        for name, shape in wanted.items():
            stored = self._stored[name]
            if stored.dtype not in FLOATS:
                self._scale_of[name] = self._scales(name, stored)
            if stored.shape != tuple(shape):
                raise WeightsError(
                    f"{self._folder}: weight {name} has shape {list(stored.shape)}; config.json needs "
                    f"{list(shape)}; use weights and config of one model"
                )

    def _scales(self, name: str, stored: Stored) -> str:
        """Return the name of an FP8 matrix's scales."""
        module = name.removesuffix(".weight")
        found = [scales for suffix in SCALES if (scales := f"{module}.{suffix}") in self._stored]
        readable = stored.dtype == FP8 and len(stored.shape) == 2 and module != name
        if not readable or len(found) != 1 or self._stored[found[0]].dtype not in SCALE_DTYPES:
            beside = (
                f" and {' and '.join(f'{scales} in {self._stored[scales].dtype}' for scales in found)}" if found else ""
            )
            raise WeightsError(
                f"{self._folder}: weight {name} is {stored.dtype}{beside}; floats of 16 bits or more are needed, or "
                f"{FP8} with scales in {' or '.join(SCALES)}; give the folder of the unquantised model"
            )
        if found[0].endswith("_inv") and self._scaling.block is None and self._stored[found[0]].shape not in ((), (1,)):
            raise WeightsError(
                f"{self._folder}: {found[0]} has shape {list(self._stored[found[0]].shape)} and config.json no "
                "quantization_config.weight_block_size; use the model's own config.json"
            )
        return found[0]

    def _require_equal_head(self) -> None:
        head, table = (read_tensor(name, self._stored[name].path) for name in (HEAD, EMBEDDING))
        if head.shape != table.shape or not torch.equal(head, table):
            raise WeightsError(
                f"{self._folder}: {HEAD} differs from {EMBEDDING} and tie_word_embeddings is true; set it to false in "
                f"config.json to use this head, or remove {HEAD} from the weights"
            )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Tensors of all weight files of a folder, by name. Raises WeightsError if a file is missing or damaged."""
    if (folder / ADAPTER).exists():  # transformers would add the adapter to the weights
        raise WeightsError(f"{folder} holds an adapter, {ADAPTER}; merge it into the weights, or remove it")
    found: dict[str, Stored] = {}
    index = _places(folder)
    for path in _paths(folder, index):
        for name, stored in stored_in(path).items():
            if name in found:
                raise WeightsError(f"{path}: weight {name} is in {found[name].path.name} too; fetch the folder again")
            found[name] = stored
    for name, file in index.items():
        if name not in found or found[name].path.name != Path(file).name:
            raise WeightsError(f"{folder / INDEX} has weight {name} in {file}, which lacks it; fetch the folder again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights of a folder, and the index of several. Raises WeightsError if one is missing."""
    index = _places(folder)
    paths = [*([folder / INDEX] if index else []), *_paths(folder, index)]
    for path in paths:
        if not path.is_file():
            raise WeightsError(f"{path} is missing; fetch the folder again")
    return paths


def stored_in(path: Path) -> dict[str, Stored]:
    """Tensors of one safetensors file, by name."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  `file` is not a mapping
            return {name: Stored(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); fetch the folder again") from error


def float_tensors(path: Path) -> dict[str, Stored]:
    """Tensors of one file of ours, by name. Raises WeightsError if a tensor is no float of 16 bits or more."""
    found = stored_in(path)
    for name, stored in found.items():
        if stored.dtype not in FLOATS:
            raise WeightsError(
                f"{path}: weight {name} is {stored.dtype}; floats of 16 bits or more are needed; fetch the file again"
            )
    return found


def read_tensor(name: str, path: Path) -> Tensor:
    """Read one tensor of a safetensors file. Raises WeightsError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: weight {name} cannot be read ({error}); fetch the folder again") from error


def _places(folder: Path) -> dict[str, str]:
    """Names of tensors -> names of their files; empty if one file holds all weights."""
    return {} if (folder / SINGLE).exists() else _index(folder)


def _paths(folder: Path, index: dict[str, str]) -> list[Path]:
    return [folder / name for name in sorted(set(index.values()))] if index else [folder / SINGLE]


def _index(folder: Path) -> dict[str, str]:
    """Names of tensors -> names of their files."""
    where = folder / INDEX
    if not where.exists():
        raise WeightsError(f"{folder} has no {SINGLE}; give a folder with safetensors weights")
    places = json_object(where, where.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise WeightsError(f"{where} has no weight_map from tensors to files; fetch the folder again")
    if others := [file for file in places.values() if not file.endswith(SUFFIX) or "/" in file]:
        raise WeightsError(
            f"{where} names {others[0]!r}, which is no {SUFFIX} file of its folder; fetch the folder again"
        )
    return places


def _named(names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"tensor {names[0]}{others}"
