"""The registry of models: versions, each a published bundle, and the aliases `champion` and `challenger`.

Which bundle is the champion?

A registry version points at a bundle by its URI and carries its hash, its gates and its lineage as tags. The alias
`challenger` names the latest version that met its gates; `champion` names the version that serves. Each promotion is a
number on the version itself, one above all others (`promotions`). A rollback removes the champion's number, so it needs
no other record. Of two promotions at once, one version becomes champion and the other its predecessor.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidar_core.artifacts.model.bundle_info import BundleInfo, model_info, read_bundle_info
from tidar_core.artifacts.model.report_figures import not_finite
from tidar_core.artifacts.registry.alias_order import follow, highest, number, numbered
from tidar_core.artifacts.registry.mlflow_client import (
    absolute_tracking_uri,
    client_of,
    in_one_line,
    named,
    numbers,
    require_database,
    require_model,
    require_name,
    require_version,
    versions,
)
from tidar_core.artifacts.registry.promotions import CHAMPION, PROMOTION, promote_version, roll_back_from
from tidar_core.artifacts.store import locations
from tidar_core.errors import BundleError, GateError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "FoundBundle",
    "ListedVersion",
    "RegistryVersion",
    "absolute_tracking_uri",
    "aliases",
    "find_bundle",
    "list_versions",
    "promote",
    "publish_version",
    "resolve",
    "rollback",
    "set_challenger",
    "withdraw",
]

CHALLENGER = "challenger"

MODEL_SCHEME = "models:/"
WITHDRAWN = "withdrawn"
"""Tag: the reason why a version has lost an alias."""
NAMED_AS = "trial."
"""Prefix of an alias that makes a tag: the number under which the alias named the version, one above all others."""
ON_DISK = "bundle://"
"""Prefix of a path on a tracking server: it takes no plain paths, so that clients cannot read its own files."""
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True, slots=True)
class RegistryVersion:
    """A registered bundle."""

    name: str
    version: int
    bundle_uri: str
    bundle_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedVersion:
    """A version as an entry of a list."""

    name: str
    version: int
    status: str
    """`champion`, `challenger`, both, `earlier champion` (a rollback may come back to it), or nothing."""
    bundle: str
    bundle_hash: str
    base_hash: str
    """Content hash of the checkpoint that the version drafts for; empty if all weights were trained."""
    gates: Mapping[str, Any]
    run_id: str | None
    """The training run."""


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """The location of a bundle or a checkpoint and its description of itself."""

    uri: str
    info: BundleInfo
    version: int | None = None
    """Version in the registry; None for a bundle that was given by its location."""


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
    """The version that points at a bundle: a new version, or the existing version with its tags renewed.

    report_summary  measured figures of the bundle: its gates
    run_id          the training run
    """
    all_tags = {
        "bundle_hash": info.bundle_hash,
        "block_len": str(info.block_len),
        "base_hash": "" if info.drafts is None else info.drafts.base_hash,
        "objective": info.objective,
        "lineage": json.dumps(dict(info.lineage)),
        "gates": json.dumps(dict(report_summary)),
        **(tags or {}),
    }
    source = locations.absolute(bundle_uri)
    if locations.local_path(bundle_uri) is not None and tracking_uri.startswith("http"):
        source = ON_DISK + source
    require_name(name)
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
    """Makes the version challenger: the version that would serve next."""
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        require_version(client, tracking_uri, name, version)
        if WITHDRAWN in client.get_model_version(name, str(version)).tags:
            client.delete_model_version_tag(name, str(version), WITHDRAWN)
        number(client, name, version, NAMED_AS + CHALLENGER)
        _follow_numbers(client, name, CHALLENGER)


def aliases(tracking_uri: str, name: str) -> dict[str, int]:
    """Alias -> the version that it names now, for each alias of a model."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        model = require_model(client_of(tracking_uri), tracking_uri, name)
        return {alias: int(version) for alias, version in model.aliases.items()}


def withdraw(tracking_uri: str, name: str, alias: str, version: int, why: str) -> None:
    """Removes an alias from a version, if it still names that version; the tag `withdrawn` records `why`."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        client.set_model_version_tag(name, str(version), WITHDRAWN, why)
        if int(require_model(client, tracking_uri, name).aliases.get(alias, 0)) != version:
            return
        if version not in numbered(client, name, NAMED_AS + alias):  # the alias was set by hand, in MLflow itself
            number(client, name, version, NAMED_AS + alias)
        _follow_numbers(client, name, alias)


def promote(tracking_uri: str, name: str, version: int) -> int:
    """Makes the version champion and returns the champion: another version if that was promoted at the same time.

    Raises GateError for a version that was published with a figure that is not finite.
    """
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        model = require_version(client, tracking_uri, name, version)
        if wrong := not_finite(_gates(client.get_model_version(name, str(version)))):
            raise GateError(
                f"model {name} version {version} is not promoted: its gates have {', '.join(wrong)}; "
                "train it again, evaluate and publish the new bundle"
            )
        champion = model.aliases.get(CHAMPION)
        return promote_version(client, name, version, None if champion is None else int(champion))


def rollback(tracking_uri: str, name: str) -> int:
    """Makes the version that the champion replaced champion again, and returns it."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        model = require_model(client, tracking_uri, name)
        champion = model.aliases.get(CHAMPION)
        if champion is None:
            raise RegistryError(f"model {name} has no champion to roll back; promote one of {numbers(client, name)}")
        version = roll_back_from(client, name, int(champion))
        if version is None:
            raise RegistryError(
                f"model {name} version {champion} is its first champion; nothing to roll back to: "
                f"promote another of {numbers(client, name)}"
            )
        return version


def list_versions(tracking_uri: str, name: str | None = None) -> list[ListedVersion]:
    """Every version of a model, or of all models; the latest version of each model first."""
    require_database(tracking_uri, name)
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        if name is not None:
            require_model(client, tracking_uri, name)
        names = [name] if name is not None else [model.name for model in client.search_registered_models()]
        return [_listed(client, known, version) for known in names for version in reversed(versions(client, known))]


def resolve(tracking_uri: str, uri: str) -> RegistryVersion:
    """The registered bundle that models:/NAME@ALIAS or models:/NAME/VERSION refers to."""
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
    """The model that a user means: a folder or URI of a bundle or a checkpoint, or a registered model.

    Raises BundleError if the bundle of a registered model has another hash than it was registered with.
    """
    if not model.startswith(MODEL_SCHEME):
        return FoundBundle(locations.absolute(model), model_info(model))
    registered = resolve(tracking_uri, model)
    info = read_bundle_info(registered.bundle_uri)
    if info.bundle_hash != registered.bundle_hash:
        raise BundleError(
            f"{model} is registered with hash {registered.bundle_hash[:12]}; {registered.bundle_uri} has "
            f"{info.bundle_hash[:12]}; publish the new bundle as a version of its own"
        )
    return FoundBundle(locations.absolute(registered.bundle_uri), info, registered.version)


def _follow_numbers(client: "MlflowClient", name: str, alias: str) -> None:
    """Moves the alias to the version with the highest number, or deletes it if that version was withdrawn."""

    def last_named() -> int | None:
        last = highest(client, name, NAMED_AS + alias)
        return None if WITHDRAWN in client.get_model_version(name, str(last)).tags else last

    follow(client, name, alias, last_named)


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
        base_hash=tags.get("base_hash", ""),
        gates=_gates(version),
        run_id=version.run_id or None,
    )


def _gates(version: "ModelVersion") -> dict[str, Any]:
    """Measured figures of a version when it was published."""
    given = version.tags.get("gates", "{}")
    try:
        if isinstance(gates := json.loads(given), dict):
            return gates
    except ValueError:
        pass
    raise RegistryError(
        f"model {version.name} version {version.version} has tag gates {given[:80]!r}; it must be a JSON object; "
        "publish the bundle again, or delete the tag in MLflow"
    )
