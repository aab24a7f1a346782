"""The reader of YAML files with settings, such as a job's or a service's."""

from pathlib import Path
from typing import Any

import yaml

from tidar_core.errors import ConfigError

__all__ = ["read_mapping"]


def read_mapping(path: str | Path, what: str, example: str) -> dict[str, Any]:
    """Keys and values of the YAML file at `path`. Raises ConfigError with one line.

    what     name of the file's kind for the message, such as `job file`
    example  location of such files
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{what} {path} does not exist; give the path of a YAML file such as {example}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} holds {type(values).__name__}; it must be a mapping of keys to values")
    return values
