"""Release of a bundle as a registry version.

Which bundles may be released? The report must be about the bundle and meet every bar of the job. The new version gets
the alias `challenger`. Its tags hold the bars that it met, its sources, and the runs that trained and evaluated it.
"""

import json
from typing import Any

from pipelines.evaluation.gates import bars
from pipelines.evaluation.job import PublishJob
from tidar_core.artifacts.model.bundle_info import verify_bundle
from tidar_core.artifacts.model.report_figures import not_finite
from tidar_core.artifacts.registry import model_registry, runs
from tidar_core.artifacts.store import locations
from tidar_core.errors import ConfigError, GateError

__all__ = ["publish"]


NAMED = 12
"""Most figures that an error names, of a report with figures that are not finite."""


def publish(job: PublishJob) -> int:
    """The version number under which the bundle is registered. Raises GateError naming every missed bar."""
    bundle = locations.absolute(job.bundle)
    info = verify_bundle(bundle)
    report = _read_report(job.report)
    if report["bundle_hash"] != info.bundle_hash:
        raise GateError(
            f"{job.report} is about bundle {report['bundle_hash'][:12]}, {job.bundle} is {info.bundle_hash[:12]}; "
            "evaluate this bundle first"
        )
    if wrong := not_finite(report):
        raise GateError(
            f"{job.bundle} is not published: {job.report} has {len(wrong)} figures that are not finite: "
            f"{', '.join(wrong[:NAMED])}; train it again and evaluate the new bundle"
        )
    held = bars(job, report)
    if missed := [bar.words for bar in held if not bar.met]:
        raise GateError(f"{job.bundle} is not published: {'; '.join(missed)}")
    tracking_uri = model_registry.absolute_tracking_uri(job.tracking_uri)
    made = {job_kind: runs.find_run(tracking_uri, job_kind, info.bundle_hash) for job_kind in ("train", "evaluate")}
    tags = {
        "bars": json.dumps([bar.words for bar in held]),
        "report": locations.absolute(job.report),
        "data_manifest": str(info.lineage.get("shards", "")),
        "evaluated_on": report["shards"],
        "evaluation_run": made["evaluate"] or "",
    }
    version = model_registry.publish_version(
        tracking_uri, job.name, bundle, info, _summary(report), made["train"], tags=tags
    )
    model_registry.set_challenger(tracking_uri, job.name, version)
    return version


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Figures of a report that a list of versions shows."""
    names = ("ar_loss", "diffusion_loss", "tokens_per_forward", "greedy_equal", "prompts", "speed_over_ar")
    summary = {name: report.get(name) for name in names}
    if parent := report.get("parent"):
        summary["ar_loss_of_parent"] = parent["ar_loss"]
    for entry in report.get("tasks", ()):
        summary[entry["task"]] = min(mode["score"] for mode in entry["modes"].values())
    return summary


def _read_report(uri: str) -> dict[str, Any]:
    """The report in a folder, or at a path."""
    path = uri if uri.endswith(".json") else locations.join(uri, "report.json")
    if not locations.exists(path):
        raise ConfigError(f"report {path} does not exist; run evaluate first")
    try:
        report = json.loads(locations.read_text(path))
    except ValueError as error:
        raise ConfigError(f"report {path} is not JSON; run evaluate again") from error
    if not isinstance(report, dict) or not {"bundle_hash", "shards"} <= report.keys():
        raise ConfigError(f"report {path} names no bundle_hash and shards; give a report that evaluate has written")
    return report
