"""Folder of a quickstart: its job files, and the machine that it runs on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.jobs import J, read_job

__all__ = ["MODEL_NAME", "Site"]

MODEL_NAME = "quickstart"
"""Name in the registry."""


@dataclass(frozen=True, slots=True)
class Site:
    """The folder of one quickstart, and this machine."""

    workdir: Path
    threads: int

    @staticmethod
    def of(workdir: Path) -> "Site":
        """The site in a folder, which is made if it is missing, with all cores of this machine."""
        (workdir / "jobs").mkdir(parents=True, exist_ok=True)
        return Site(workdir.resolve(), os.cpu_count() or 1)

    @property
    def tracking_uri(self) -> str:
        """MLflow's database in the folder."""
        return f"sqlite:///{self.workdir}/mlflow.db"

    def path(self, name: str) -> str:
        """Location of a file or folder of the quickstart."""
        return str(self.workdir / name)

    def job(self, name: str, kind: type[J], /, **values: Any) -> J:
        """The job of an earlier run's file, or of a new file of these values; functions among them are called."""
        path = self.workdir / "jobs" / f"{name}.yaml"
        if not path.exists():
            made = {key: value() if callable(value) else value for key, value in values.items()}
            content = kind.model_validate(made).model_dump(mode="json")
            path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_job(kind, path)
