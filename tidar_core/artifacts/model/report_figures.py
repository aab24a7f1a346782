"""Search of a report for figures that are not finite.

Which numbers of a report are nan or infinite?
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["not_finite"]


def not_finite(values: Mapping[str, Any]) -> list[str]:
    """List `name value` for each nan and infinity in `values`, at any depth, e.g. `modes.auto.over_ar nan`."""
    return [f"{name} {value}" for name, value in _figures(values, "") if not math.isfinite(value)]


def _figures(value: Any, name: str) -> list[tuple[str, float]]:
    if isinstance(value, float):
        return [(name, value)]
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(f"{name}.{key}" if name else str(key), entry) for key, entry in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inner = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    return [found for key, entry in inner for found in _figures(entry, key)]
