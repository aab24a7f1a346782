"""Folder of a quickstart: its job files, and the machine that it runs on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.evaluation.job import EvaluateJob, PublishJob
from pipelines.evaluation.report import REPORT
from pipelines.jobs import J, read_job
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.store import locations

__all__ = ["MODEL_NAME", "Site", "steps_within"]

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
            locations.write_bytes(str(path), yaml.safe_dump(content, sort_keys=False).encode())
        return read_job(kind, path)

    def publish_job(self) -> PublishJob:
        """The job that registers the bundle."""
        return self.job(
            "publish",
            PublishJob,
            bundle=self.path("bundle"),
            report=self.path("report"),
            name=MODEL_NAME,
            tracking_uri=self.tracking_uri,
        )

    def finished_report(self, job: EvaluateJob) -> dict[str, Any] | None:
        """The report of an earlier run, if it describes the present bundle."""
        return self.kept_figures(locations.join(job.output, REPORT), job.bundle)

    @staticmethod
    def kept_figures(place: str, bundle: str) -> dict[str, Any] | None:
        """The figures of an earlier run in a JSON file; None if it is missing, damaged or about another bundle."""
        try:
            found = locations.read_json(place) if locations.exists(place) else None
        except ValueError:
            return None
        known = isinstance(found, dict) and found.get("bundle_hash") == read_bundle_info(bundle).bundle_hash
        return found if known else None


def steps_within(seconds: float, step_seconds: float, overhead: float) -> int:
    """Train steps that fit a budget; at least 10.

    step_seconds  a bare step, without the engine
    overhead      time of a step under the engine, with data and logging, over that of a bare step
    """
    return max(10, int(seconds / (step_seconds * overhead)))
