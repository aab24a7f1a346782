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
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{what} {path} {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} holds {type(values).__name__}; it must be a mapping of keys to values")
    return values


class _RepeatedKeyError(ValueError):
    """A mapping with two values for a key; the message is a predicate whose subject is the file."""


class _Loader(yaml.SafeLoader):
    """The safe loader; a mapping may not give a key twice. A key beside a merge key `<<` may override a merged one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The mapping as written, before merge keys are resolved. Raises _RepeatedKeyError."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise _RepeatedKeyError(
                        f"gives the key {key.value!r} on line {lines[name]} and on line {line}; remove one of them"
                    )
                lines[name] = line
        return node
