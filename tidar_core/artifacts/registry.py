"""Which bundle is the champion, and how did its training go?

A registry version points at a bundle by its URI and carries its hash, its gates and its lineage as tags. The alias
`challenger` is the latest version that met its bars; `champion` is what serves. Each promotion is a number on the
version itself, one above all others; the alias follows the highest, and a rollback takes the champion's number away. So
a rollback needs nobody's memory, and of two promotions at once one is the champion and the other the one before it.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidar_core.artifacts import locations
from tidar_core.artifacts.alias_order import follow, highest, number, numbered
from tidar_core.artifacts.bundle import BundleInfo, read_bundle_info
from tidar_core.artifacts.mlflow_client import (
    absolute_tracking_uri,
    client_of,
    experiment_id,
    in_one_line,
    named,
    numbers,
    require_database,
    require_model,
    require_version,
    versions,
)
from tidar_core.errors import BundleError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "PARENT_RUN",
    "FoundBundle",
    "ListedVersion",
    "RegistryVersion",
    "absolute_tracking_uri",
    "aliases",
    "end_run",
    "find_bundle",
    "find_run",
    "list_versions",
    "log_artifact",
    "log_data",
    "log_metrics",
    "log_text",
    "promote",
    "publish_version",
    "resolve",
    "rollback",
    "set_challenger",
    "start_run",
    "system_metrics",
    "withdraw",
]

CHAMPION = "champion"
CHALLENGER = "challenger"

MODEL_SCHEME = "models:/"
PROMOTION = "promotion"
"""Tag: the number of a promotion that holds, or is one of those to go back to."""
WITHDRAWN = "withdrawn"
"""Tag: why a version has lost an alias."""
TRIAL = "trial."
"""Before an alias, a tag: the number of the version's trial under that alias, one above all others."""
PARENT_RUN = "mlflow.parentRunId"
"""Tag: the run below which MLflow's pages show this one."""
ON_DISK = "bundle://"
"""Before a path, where a server keeps it: it takes no plain paths, lest others read its own files."""
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
PARAMS_AT_ONCE = 100
"""What one MLflow request takes."""
DIGEST_LEN = 36
"""Of a data set, as MLflow keeps it; the whole identity stands in its source."""


@dataclass(frozen=True, slots=True)
class RegistryVersion:
    """A registered bundle."""

    name: str
    version: int
    bundle_uri: str
    bundle_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedVersion:
    """A version as a list tells it."""

    name: str
    version: int
    status: str
    """`champion`, `challenger`, both, `earlier champion` (a rollback may come back to it), or nothing."""
    bundle: str
    bundle_hash: str
    gates: Mapping[str, Any]
    run_id: str | None
    """The training run."""


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """Where a model's bundle lies, and what it says of itself."""

    uri: str
    info: BundleInfo
    version: int | None = None
    """In the registry; None for a bundle that was given by its location."""


def start_run(tracking_uri: str, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Begin a run and say its id; the experiment is made if it is new."""
    from mlflow.entities import Param

    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        run = client.create_run(experiment_id(client, tracking_uri, experiment), tags=dict(tags), run_name=name)
        given = [Param(key, str(value)) for key, value in params.items()]
        for first in range(0, len(given), PARAMS_AT_ONCE):
            client.log_batch(run.info.run_id, params=given[first : first + PARAMS_AT_ONCE])
        return run.info.run_id


def log_metrics(tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Numbers of a run at a train step."""
    from mlflow.entities import Metric

    now = round(time.time() * 1000)
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items()])


def log_artifact(tracking_uri: str, run_id: str, path: str) -> None:
    """Keep a small local file, such as a report, with a run."""
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_artifact(run_id, path)


def log_text(tracking_uri: str, run_id: str, name: str, text: str) -> None:
    """Keep a page of text with a run, in a file of that name, folders included."""
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_text(run_id, text, name)


def log_data(tracking_uri: str, run_id: str, uri: str, identity: str, context: str) -> None:
    """Name the shards that a run read, by their manifest's identity, where MLflow links runs and data.

    context  what for, such as `training`
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": locations.absolute(uri), "identity": identity})
    data = Dataset(locations.name_of(uri), identity[:DIGEST_LEN], "tidar-shards", source)
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


@contextmanager
def system_metrics(tracking_uri: str, run_id: str, machine: str, seconds: float) -> Iterator[None]:
    """Measure this machine every so many seconds while the context is open: load, memory, disk, network, GPUs.

    machine  name between `system/` and the metric's: runs have several machines
    """
    client_of(tracking_uri)
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=seconds, resume_logging=True, node_id=machine, tracking_uri=tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def end_run(tracking_uri: str, run_id: str, status: str = "FINISHED", *, tags: Mapping[str, str] | None = None) -> None:
    """Close a run: FINISHED, FAILED or KILLED; `tags` say what came of it."""
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        for key, value in (tags or {}).items():
            client.set_tag(run_id, key, value)
        client.set_terminated(run_id, status)


def find_run(tracking_uri: str, station: str, bundle_hash: str) -> str | None:
    """The latest finished run of a station that is about a bundle."""
    wanted = f"tags.station = '{station}' and tags.bundle_hash = '{bundle_hash}' and attributes.status = 'FINISHED'"
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, wanted, max_results=1)  # the latest first
        return str(found[0].info.run_id) if found else None


def publish_version(
    tracking_uri: str,
    name: str,
    bundle_uri: str,
    info: BundleInfo,
    report_summary: Mapping[str, Any],
    run_id: str | None = None,
    *,
    tags: Mapping[str, str] | None = None,
) -> int:
    """The version that points at a bundle: a new one, or the one that already does, with its tags renewed.

    report_summary  what the bundle was measured to be: its gates
    run_id          the training run
    """
    all_tags = {
        "bundle_hash": info.bundle_hash,
        "block_len": str(info.block_len),
        "objective": info.objective,
        "lineage": json.dumps(dict(info.lineage)),
        "gates": json.dumps(dict(report_summary)),
        **(tags or {}),
    }
    source = locations.absolute(bundle_uri)
    if locations.local_path(bundle_uri) is not None and tracking_uri.startswith("http"):
        source = ON_DISK + source
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        if not named(client, name):
            client.create_registered_model(name)
        for known in versions(client, name):
            if (known.source, known.tags.get("bundle_hash")) == (source, info.bundle_hash):
                for key, value in all_tags.items():
                    client.set_model_version_tag(name, str(known.version), key, value)
                return int(known.version)
        return int(client.create_model_version(name, source=source, run_id=run_id, tags=all_tags).version)


def set_challenger(tracking_uri: str, name: str, version: int) -> None:
    """Name the version that would serve next."""
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        require_version(client, tracking_uri, name, version)
        if WITHDRAWN in client.get_model_version(name, str(version)).tags:
            client.delete_model_version_tag(name, str(version), WITHDRAWN)
        number(client, name, version, TRIAL + CHALLENGER)
        _follow_trials(client, name, CHALLENGER)


def aliases(tracking_uri: str, name: str) -> dict[str, int]:
    """Which version each alias of a model names now."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        model = require_model(client_of(tracking_uri), tracking_uri, name)
        return {alias: int(version) for alias, version in model.aliases.items()}


def withdraw(tracking_uri: str, name: str, alias: str, version: int, why: str) -> None:
    """Take an alias away from a version, if it still names that one; the version's tag `withdrawn` says why."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        client.set_model_version_tag(name, str(version), WITHDRAWN, why)
        if int(require_model(client, tracking_uri, name).aliases.get(alias, 0)) != version:
            return
        if version not in numbered(client, name, TRIAL + alias):  # named so by hand, in MLflow itself
            number(client, name, version, TRIAL + alias)
        _follow_trials(client, name, alias)


def promote(tracking_uri: str, name: str, version: int) -> int:
    """Make the version champion; says which is, another one if that was promoted at the same time."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        model = require_version(client, tracking_uri, name, version)
        champion = model.aliases.get(CHAMPION)
        if champion is not None and int(champion) == version:
            return version
        if champion is not None and int(champion) not in numbered(client, name, PROMOTION):  # made so by hand
            client.set_model_version_tag(name, str(champion), PROMOTION, "0")
        number(client, name, version, PROMOTION)
        return _follow_promotions(client, name)


def rollback(tracking_uri: str, name: str) -> int:
    """Make the version that the champion replaced champion again; says which."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        model = require_model(client, tracking_uri, name)
        champion = model.aliases.get(CHAMPION)
        if champion is None:
            raise RegistryError(f"model {name} has no champion to roll back; promote one of {numbers(client, name)}")
        promoted = numbered(client, name, PROMOTION)
        if not promoted.keys() - {int(champion)}:
            raise RegistryError(
                f"model {name} version {champion} is its first champion; nothing to roll back to: "
                f"promote another of {numbers(client, name)}"
            )
        if int(champion) in promoted:  # else made so by hand
            client.delete_model_version_tag(name, str(champion), PROMOTION)
        return _follow_promotions(client, name)


def list_versions(tracking_uri: str, name: str | None = None) -> list[ListedVersion]:
    """Every version of a model, or of all; the latest of each first."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        if name is not None:
            require_model(client, tracking_uri, name)
        names = [name] if name is not None else [model.name for model in client.search_registered_models()]
        return [_listed(client, known, one) for known in names for one in reversed(versions(client, known))]


def resolve(tracking_uri: str, uri: str) -> RegistryVersion:
    """The bundle behind models:/NAME@ALIAS or models:/NAME/VERSION."""
    parts = MODEL_URI.fullmatch(uri)
    if not parts:
        raise RegistryError(f"model is {uri}; give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias = parts["name"], parts["alias"]
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        model = require_model(client, tracking_uri, name)
        if alias and alias not in model.aliases:
            known = ", ".join(f"{key} (version {value})" for key, value in sorted(model.aliases.items()))
            raise RegistryError(
                f"model {name} has no alias {alias!r}; it has {known or 'none'}, and versions {numbers(client, name)}"
            )
        number = int(model.aliases[alias] if alias else parts["version"])
        require_version(client, tracking_uri, name, number)
        found = client.get_model_version(name, str(number))
    if "bundle_hash" not in found.tags:
        raise RegistryError(f"model {name} version {number} has no bundle_hash; publish it with tidar publish")
    return RegistryVersion(name, number, str(found.source).removeprefix(ON_DISK), found.tags["bundle_hash"])


def find_bundle(tracking_uri: str, model: str) -> FoundBundle:
    """The bundle that a user means: a folder or URI, or a registered model, of the hash it was registered with."""
    if not model.startswith(MODEL_SCHEME):
        return FoundBundle(locations.absolute(model), read_bundle_info(model))
    registered = resolve(tracking_uri, model)
    info = read_bundle_info(registered.bundle_uri)
    if info.bundle_hash != registered.bundle_hash:
        raise BundleError(
            f"{model} is registered with hash {registered.bundle_hash[:12]}; {registered.bundle_uri} has "
            f"{info.bundle_hash[:12]}; publish the new bundle as a version of its own"
        )
    return FoundBundle(locations.absolute(registered.bundle_uri), info, registered.version)


def _follow_promotions(client: "MlflowClient", name: str) -> int:
    """Put the alias where the highest promotion is; says where."""
    version = follow(client, name, CHAMPION, lambda: highest(client, name, PROMOTION))
    assert version is not None, "somebody has just been promoted, or stays so"
    return version


def _follow_trials(client: "MlflowClient", name: str, alias: str) -> None:
    """Put the alias where the last trial began, and nowhere if that version was withdrawn."""

    def tried() -> int | None:
        last = highest(client, name, TRIAL + alias)
        return None if WITHDRAWN in client.get_model_version(name, str(last)).tags else last

    follow(client, name, alias, tried)


def _listed(client: "MlflowClient", name: str, version: "ModelVersion") -> ListedVersion:
    number, tags = str(version.version), version.tags
    aliases = client.get_registered_model(name).aliases
    status = [alias for alias in (CHAMPION, CHALLENGER) if str(aliases.get(alias)) == number]
    if PROMOTION in tags and CHAMPION not in status:
        status.append("earlier champion")
    return ListedVersion(
        name=name,
        version=int(number),
        status=", ".join(status),
        bundle=str(version.source).removeprefix(ON_DISK),
        bundle_hash=tags.get("bundle_hash", ""),
        gates=json.loads(tags.get("gates", "{}")),
        run_id=version.run_id or None,
    )
