"""The provenance of an artefact folder, in its file made_by.json.

What made this folder?

Every artefact folder has a made_by.json. It contains the job as validated, the code revision, the versions of the
software that ran, and the identities of the source folders. Lineage follows from these files. They contain no times, so
that the same work leaves the same bytes.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidar_core.artifacts.store import locations

__all__ = ["MADE_BY", "code_revision", "made_by", "write_made_by"]

MADE_BY = "made_by.json"
PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "ray", "deepspeed")


def made_by(job: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
    """The content of made_by.json.

    job        the job as validated, in JSON's types
    parents    folders that the job read: a name for each folder -> the folder's identity
    """
    return {
        "job": dict(job),
        "parents": dict(parents),
        "code_revision": code_revision(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def write_made_by(uri: str, content: Mapping[str, Any]) -> None:
    """Writes made_by.json into the folder at `uri`."""
    locations.write_json(locations.join(uri, MADE_BY), content)


def code_revision() -> str:
    """Code revision: TIDAR_REVISION if set (in an image), else the git commit (+ if files differ), else the version."""
    if revision := os.environ.get("TIDAR_REVISION"):
        return revision
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return f"tidar {_version('tidar') or 'of unknown version'}"
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Output of git in the folder of this code; empty if there is no git or no repository."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
