"""Commands on registered versions."""

from typing import Annotated

import typer

from tidar.options import TRACKING, Json, Tracking
from tidar.output import print_facts

__all__ = ["models", "promote", "rollback"]


def models(
    name: Annotated[str | None, typer.Argument(help="One model; all by default.")] = None,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """List registered versions: status, hash, gates."""
    from dataclasses import asdict

    from pipelines.evaluation.tables import print_models
    from tidar_core.artifacts.registry import model_registry

    listed = model_registry.list_versions(model_registry.absolute_tracking_uri(tracking_uri), name)
    print_facts({"models": [asdict(version) for version in listed]}, as_json, print_models)


def promote(name: str, version: int, tracking_uri: Tracking = TRACKING, as_json: Json = False) -> None:
    """Make a version the champion; the champion before it is recorded for rollback."""
    from tidar_core.artifacts.registry import model_registry

    champion = model_registry.promote(model_registry.absolute_tracking_uri(tracking_uri), name, version)
    print_facts({"name": name, "registry_version": champion, "alias": "champion"}, as_json)


def rollback(name: str, tracking_uri: Tracking = TRACKING, as_json: Json = False) -> None:
    """Make the previous champion the champion again."""
    from tidar_core.artifacts.registry import model_registry

    version = model_registry.rollback(model_registry.absolute_tracking_uri(tracking_uri), name)
    print_facts({"name": name, "registry_version": version, "alias": "champion"}, as_json)
