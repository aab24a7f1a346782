"""GGUF files: their metadata, and their tensors one at a time.

Quantised tensors are dequantised by the `gguf` package. A file that is cut short, split, big-endian or of an
unsupported type is refused before any tensor is read.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tidar_core.errors import WeightsError

__all__ = ["GgufFile", "read_metadata"]

VERSIONS = (2, 3)
FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FINE = (*FLOATS, "Q8_0")
"""Types whose error is hard to measure in a model's distribution."""
ROWS = 4096
"""Rows of a matrix that are dequantised at once."""
AGAIN = "fetch the file again"


class GgufFile:
    """One GGUF file of a model, whole and little-endian."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of a file. Raises WeightsError if the file cannot be used."""
        reader, self.fields = _opened(path)
        """Metadata by key."""
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        _require_one_model(path, self.fields)
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in (*FLOATS, *QUANTISED):
                raise WeightsError(
                    f"{path}: tensor {name} is {tensor.tensor_type.name}; {', '.join((*FLOATS, *QUANTISED))} are "
                    "supported; use a file of another quantisation"
                )

    @property
    def architecture(self) -> str:
        """The architecture's name, which is also the prefix of its metadata keys."""
        return str(self.fields.get("general.architecture"))

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._tensors)

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(tensor.tensor_type.name for tensor in self._tensors.values()))

    @property
    def coarse_types(self) -> list[str]:
        """Types of fewer than 8 bits a weight, which change a model's distribution noticeably."""
        return [name for name in self.types if name not in FINE]

    def type_of(self, name: str) -> str:
        """The type of a tensor, such as Q4_1."""
        return str(self._tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in PyTorch's order, outputs first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """Read a tensor: floats in their own dtype, quantised weights as the fp32 values that they represent.

        Raises WeightsError if a value is not finite.
        """
        stored, kind = self._tensors[name], self.type_of(name)
        if kind == "BF16":
            value = torch.from_numpy(np.array(stored.data)).view(torch.bfloat16)
        elif kind in FLOATS:
            value = torch.from_numpy(np.array(stored.data))
        else:
            value = torch.empty(self.shape(name))
            for begin in range(0, len(stored.data), ROWS):  # the package keeps its result twice
                part = stored.data[begin : begin + ROWS]
                with np.errstate(all="ignore"):  # values that are not finite are refused below
                    value[begin : begin + ROWS] = torch.from_numpy(gguf.quants.dequantize(part, stored.tensor_type))
        if not value.isfinite().all():
            raise WeightsError(f"{self.path}: tensor {name} has values that are not finite; {AGAIN}")
        return value.reshape(self.shape(name))


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a file by key, whatever its model is. Raises WeightsError if the file is damaged."""
    return _opened(path)[1]


def _opened(path: Path) -> tuple["_WholeReader", Mapping[str, Any]]:
    """A file and its metadata by key. Raises WeightsError if the file is no GGUF file, cut short or damaged."""
    _require_gguf(path)
    try:
        with np.errstate(all="ignore"):
            reader = _WholeReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        _require_in_order(reader)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path} is cut short or damaged ({reason}); {AGAIN}") from error
    return reader, fields


class _WholeReader(gguf.GGUFReader):
    """A reader that raises ValueError at the end of the file. The package's own returns fewer bytes there."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.data = np.asarray(self.data)  # pyrefly: ignore[bad-assignment]  # slices of a memmap are slow
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError(f"{len(self.data)} bytes, and more are needed at {offset}")
        return found


def _require_in_order(reader: gguf.GGUFReader) -> None:
    """Raise ValueError unless tensors lie one after another in the order of their headers, as llama.cpp needs it."""
    place = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise ValueError(f"tensor {tensor.name!r} is at {tensor.data_offset}; the tensors before it end at {place}")
        place += math.ceil(tensor.n_bytes / int(reader.alignment)) * int(reader.alignment)


def _require_gguf(path: Path) -> None:
    """Raise WeightsError if the first bytes are not those of a supported GGUF file."""
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
    if magic != b"GGUF":
        raise WeightsError(f"{path} is no GGUF file; give a .gguf file, package:NAME or a Hugging Face folder")
    if int.from_bytes(version, "little") not in VERSIONS:
        if int.from_bytes(version, "big") in VERSIONS:
            raise WeightsError(f"{path} is big-endian; little-endian is needed; convert the model again")
        raise WeightsError(
            f"{path} has GGUF version {int.from_bytes(version, 'little')}; versions 2 and 3 are supported; convert the "
            "model again"
        )


def _require_one_model(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise WeightsError if the file is a part of a model, or something else."""
    if (parts := fields.get("split.count", 1)) not in (0, 1):
        raise WeightsError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first")
    if (kind := fields.get("general.type", "model")) != "model":
        raise WeightsError(f"{path} has general.type {kind!r}; the file of a whole model is needed")
