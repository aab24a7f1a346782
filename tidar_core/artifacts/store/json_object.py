"""The JSON object in a file of a model's folder."""

import json
from typing import Any

from tidar_core.errors import WeightsError

__all__ = ["json_object", "parsed"]


def json_object(where: object, content: str | bytes) -> dict[str, Any]:
    """The keys and values in `content`, the content of the file at `where`. Raises WeightsError if it is no object."""
    try:
        values = parsed(content)
    except ValueError as error:
        raise WeightsError(f"{where} is not JSON ({error}); fetch the folder again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{where} holds no JSON object; fetch the folder again")
    return values


def parsed(content: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON, or is nested too deeply to be read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
