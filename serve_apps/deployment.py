"""Serve config of the service, for `serve deploy` and KubeRay.

    python -m serve_apps.deployment SETTINGS.yaml TARGET.yaml...

writes the Serve config of the settings into each target: as the whole file, for `serve deploy`, or as the serveConfigV2
of a RayService manifest. The number of replicas and their resources follow from the settings when the application is
built, so the config does not repeat them.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from serve_apps.settings import ServeSettings
from serve_apps.telemetry.tracing import tracing_config
from tidar_core.artifacts.registry.model_registry import absolute_tracking_uri
from tidar_core.artifacts.store.yaml_file import read_mapping
from tidar_core.errors import ConfigError, TidarError

__all__ = ["command_settings", "embedded", "main", "read_settings", "serve_config"]

BUILDER = "serve_apps.app:build_app"
"""Function that the cluster calls with the settings; it looks up the model there."""
FIELD = "  serveConfigV2: |\n"
"""Last field of this project's RayService manifests; the config follows it."""


def read_settings(path: str | Path) -> ServeSettings:
    """Settings in the YAML file at `path`. Raises ConfigError."""
    return ServeSettings.model_validate(read_mapping(path, "settings file", "infra/serve.settings.yaml"))


def command_settings(path: Path | None, *, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> ServeSettings:
    """Settings of a service on this machine. Raises ConfigError.

    path      YAML file; its keys override `defaults`
    given     values of the command line, which override both; None means not given
    """
    stated = {} if path is None else read_mapping(path, "settings file", "infra/serve.settings.yaml")
    values = dict(defaults) | stated | {key: value for key, value in given.items() if value is not None}
    if not values.get("model"):
        raise ConfigError("no model is given; give one as argument, or a settings file with the key model")
    settings = ServeSettings.model_validate(values)
    return settings.model_copy(update={"tracking_uri": absolute_tracking_uri(settings.tracking_uri)})


def serve_config(settings: ServeSettings) -> dict[str, Any]:
    """Config for `serve deploy` and for KubeRay's serveConfigV2."""
    tracing = tracing_config(settings)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "logging_config": {"encoding": "JSON", "log_level": "INFO", "enable_access_log": False},
        **({} if tracing is None else {"tracing_config": tracing}),
        "applications": [
            {
                "name": "tidar",
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": settings.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }


def embedded(manifest: str, config: str) -> str:
    """A RayService manifest with `config` as its serveConfigV2."""
    head, field, _ = manifest.partition(FIELD)
    return head + field + "".join(f"    {line}\n" for line in config.splitlines())


def main(arguments: list[str]) -> int:
    """Write the config of a settings file into each target and return the exit code."""
    if len(arguments) < 2:
        print("usage: python -m serve_apps.deployment SETTINGS.yaml TARGET.yaml...", file=sys.stderr)
        return 2
    settings, *targets = map(Path, arguments)
    try:
        config = yaml.safe_dump(serve_config(read_settings(settings)), sort_keys=False)
    except TidarError as error:
        print(f"deployment: {error}", file=sys.stderr)
        return 2
    note = (
        f"# Written by `python -m serve_apps.deployment {settings} {targets[0]}`: change the settings, not this file.\n"
    )
    for target in targets:
        before = target.read_text(encoding="utf-8") if target.is_file() else ""
        target.write_text(embedded(before, config) if FIELD in before else note + config, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
