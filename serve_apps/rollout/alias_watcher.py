"""Alias watcher: it follows a model's aliases and rolls back a challenger that fails its limits.

It looks up the aliases in the registry, sends the target to all replicas and reads their reports. A failing challenger
loses its alias. The registry and the replicas hold all state, so a restarted alias watcher continues from there.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from serve_apps.api.completion_response import ModelCard
from serve_apps.messages.version_routing import CHAMPION
from serve_apps.messages.version_stats import Since, VersionReport
from serve_apps.rollout.canary import failure
from serve_apps.rollout.model_version import ModelVersion, ServingTarget, resolve_model
from tidar_core.artifacts.registry import model_registry
from tidar_core.errors import TidarError

__all__ = ["STEPS", "AliasWatcher"]

STEPS = {
    "champion_changed": "The alias names another version, and replicas are to serve it.",
    "challenger_changed": "Another version is the challenger, or there is no challenger any more.",
    "challenger_rolled_back": "A challenger failed its limits and has lost its alias.",
    "lookup_failed": "The lookup of the aliases failed; the served versions stay.",
    "load_failed": "A replica could not load a version; its served version stays.",
}
"""Events in a model's life, which are counted."""

Found = TypeVar("Found")
SendTarget = Callable[[ServingTarget], Awaitable[Sequence[VersionReport]]]

logger = logging.getLogger("ray.serve")


class AliasWatcher:
    """State of a registered model that is served: its target, its card and its counted events."""

    def __init__(self, served: ModelVersion, card: ModelCard) -> None:
        """served  version that the service was started with
        card    card of that version
        """
        assert served.settings.model_alias is not None, "the settings have an alias to follow"
        self.settings = served.settings
        self._name, self._alias = served.settings.model_alias
        self.target = ServingTarget(champion=served)
        self.card = card
        self.steps = Counter(dict.fromkeys(STEPS, 0))
        self._canary: Since | None = None
        """Counts of the challenger and the champion since replicas first received this challenger."""
        self._withdrawn: tuple[int, str] | None = None
        """A challenger that has failed, with the reason, until the registry has recorded it."""
        self._failures: set[tuple[str, str]] = set()
        self._logged: set[tuple[str, str]] = set()
        """Failures that have been logged and persist."""

    async def look_up(self) -> None:
        """Look up the versions to serve. A lookup that fails does not stop the others."""
        self._failures = set()
        await self._attempted(self._withdraw())
        named = await self._attempted(asyncio.to_thread(model_registry.aliases, self.settings.tracking_uri, self._name))
        if named is not None:
            await self._attempted(self._follow_champion(named))
            await self._attempted(self._follow_challenger(named))

    async def update_replicas(self, send: SendTarget) -> None:
        """Send the target to the replicas, and judge the challenger by their reports.

        send  sends a target to all replicas that can be reached, and returns their reports
        """
        reports = await send(self.target)
        for report in reports:
            if report.state == "failed":
                problem = f"version {report.version} at replica {report.replica}: {report.problem}"
                self._failures.add(("load_failed", problem))
            if report.state == CHAMPION and report.bundle_hash == self.target.champion.bundle_hash:
                self.target = replace(self.target, proven=self.target.champion)
        for step, problem in sorted(self._failures - self._logged):
            self._step(step, problem)
        self._logged = self._failures
        if self._rolled_back(reports):
            await send(self.target)
            with suppress(TidarError):  # the next lookup repeats it and logs its failure
                await self._withdraw()

    async def _attempted(self, lookup: Awaitable[Found]) -> Found | None:
        """Result of a lookup; if it raises TidarError, None and a failure to be logged."""
        try:
            return await lookup
        except TidarError as error:
            self._failures.add(("lookup_failed", str(error)))
            return None

    async def _follow_champion(self, named: Mapping[str, int]) -> None:
        """Make the version that the alias names the champion. Raises TidarError and leaves the target unchanged."""
        if (version := named.get(self._alias)) is None:
            raise TidarError(f"model {self._name} has no alias {self._alias!r} any more; tidar promote sets it again")
        if version == self.target.champion.version:
            return
        champion, self.card = await self._resolved(version)
        self._step("champion_changed", f"version {champion.label} after {self.target.champion.label}")
        self.target = replace(self.target, champion=champion)

    async def _follow_challenger(self, named: Mapping[str, int]) -> None:
        """Make the version that the alias names the challenger. Raises TidarError and leaves the target unchanged."""
        if self.settings.challenger is None:
            return
        version = named.get(self.settings.challenger.alias)
        failed = self._withdrawn is not None and version == self._withdrawn[0]
        await self._set_challenger(None if failed or version == self.target.champion.version else version)

    async def _set_challenger(self, version: int | None) -> None:
        """Make a version the challenger, or have no challenger."""
        before = self.target.challenger
        if version == (None if before is None else before.version):
            return
        challenger = None if version is None else (await self._resolved(version))[0]
        self._step("challenger_changed", f"version {_label(challenger)} after {_label(before)}")
        self.target, self._canary = replace(self.target, challenger=challenger), None

    async def _resolved(self, version: int) -> tuple[ModelVersion, ModelCard]:
        return await asyncio.to_thread(resolve_model, self.settings, f"models:/{self._name}/{version}")

    def _rolled_back(self, reports: Sequence[VersionReport]) -> bool:
        """Judge the challenger; True if it was removed from the target."""
        settings, champion, challenger = self.settings, self.target.champion, self.target.challenger
        if settings.challenger is None or challenger is None:
            return False
        if self._canary is None:
            self._canary = Since(reports)
        self._canary.update(reports)
        totals = [self._canary.totals(served.bundle_hash) for served in (challenger, champion)]
        why = failure(settings.challenger, *totals)
        if why is None:
            return False
        assert challenger.version is not None, "a challenger comes from the registry"
        self._step("challenger_rolled_back", f"version {challenger.label}: {why}")
        self._withdrawn = challenger.version, why
        self.target = replace(self.target, challenger=None)
        return True

    async def _withdraw(self) -> None:
        """Record the failed challenger in the registry, and take its alias away."""
        if self._withdrawn is None or self.settings.challenger is None:
            return
        uri, alias = self.settings.tracking_uri, self.settings.challenger.alias
        await asyncio.to_thread(model_registry.withdraw, uri, self._name, alias, *self._withdrawn)
        self._withdrawn = None

    def _step(self, step: str, detail: str) -> None:
        """Count and log an event."""
        self.steps[step] += 1
        logger.warning("model %s: %s: %s", self._name, step, detail, extra={"model": self._name, "step": step})


def _label(served: ModelVersion | None) -> str:
    return "none" if served is None else served.label
