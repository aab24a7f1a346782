"""Which bundles may be released?

A bundle becomes a registry version when its report is its own and meets every bar of the job; the version then carries
the alias `challenger`.
"""

import json
from typing import Any

from pipelines.jobs import PublishJob
from tidar_core.artifacts import locations, registry
from tidar_core.artifacts.bundle import verify_bundle
from tidar_core.errors import ConfigError, GateError

__all__ = ["missed_bars", "publish"]


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
    missed = missed_bars(job, report)
    if missed:
        raise GateError(f"{job.bundle} is not published: {'; '.join(missed)}")
    names = ("ar_loss", "diffusion_loss", "tokens_per_forward", "greedy_equal", "prompts", "speed_over_ar")
    summary = {name: report[name] for name in names}
    tracking_uri = registry.absolute_tracking_uri(job.tracking_uri)
    version = registry.publish_version(tracking_uri, job.name, bundle, info, summary)
    registry.set_challenger(tracking_uri, job.name, version)
    return version


def missed_bars(job: PublishJob, report: dict[str, Any]) -> list[str]:
    """Each bar that the report misses, in words; empty when it may be released."""
    missed = []
    if job.require_greedy_equal and not report["greedy_equal"]:
        missed.append(f"greedy texts equal the AR mode's on {report['prompts_equal']} of {report['prompts']} prompts")
    if report["tokens_per_forward"] < job.min_tokens_per_forward:
        missed.append(f"tokens per forward is {report['tokens_per_forward']:.3f}, the bar {job.min_tokens_per_forward}")
    for name, bar in (("ar_loss", job.max_ar_loss), ("diffusion_loss", job.max_diffusion_loss)):
        if bar is not None and not report[name] <= bar:
            missed.append(f"{name} is {report[name]:.4f}, the bar {bar}")
    return missed


def _read_report(uri: str) -> dict[str, Any]:
    """The report in a folder, or at a path."""
    path = uri if uri.endswith(".json") else locations.join(uri, "report.json")
    if not locations.exists(path):
        raise ConfigError(f"report {path} does not exist; run evaluate first")
    try:
        return json.loads(locations.read_text(path))
    except ValueError as error:
        raise ConfigError(f"report {path} is not JSON; run evaluate again") from error
