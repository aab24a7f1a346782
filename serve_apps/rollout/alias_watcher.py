"""What shall be served by now?

One place asks the registry, tells all replicas, hears how each version does, and takes a challenger's alias away when
it falls short. Nothing is kept here that the registry and the replicas do not know: whoever comes after goes on.
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
    "champion_changed": "The alias names another version, and replicas are told to serve it.",
    "challenger_changed": "Another version is on trial, or none.",
    "challenger_rolled_back": "A challenger fell short and has lost its alias.",
    "lookup_failed": "What the aliases name could not be found out; what was served goes on.",
    "load_failed": "A replica could not load a version; what it served goes on.",
}
"""What may happen in a model's life, as it is counted."""

Found = TypeVar("Found")
Tell = Callable[[ServingTarget], Awaitable[Sequence[VersionReport]]]

logger = logging.getLogger("ray.serve")


class AliasWatcher:
    """The one who looks after a registered model."""

    def __init__(self, served: ModelVersion, card: ModelCard) -> None:
        """served  with its card: what the service was started with"""
        assert served.settings.model_alias is not None, "the settings have an alias to follow"
        self.settings = served.settings
        self._name, self._alias = served.settings.model_alias
        self.target = ServingTarget(champion=served)
        self.card = card
        self.steps = Counter(dict.fromkeys(STEPS, 0))
        self._trial: Since | None = None
        """How the challenger and the champion have done since replicas were first told of this challenger."""
        self._withdrawn: tuple[int, str] | None = None
        """A challenger that has failed, and why, until the registry knows it too."""
        self._failures: set[tuple[str, str]] = set()
        self._said: set[tuple[str, str]] = set()
        """Failures that have been logged and go on."""

    async def ask(self) -> None:
        """Find out what is to be served by now. A lookup that fails keeps no other from its work."""
        self._failures = set()
        await self._tried(self._withdraw())
        named = await self._tried(asyncio.to_thread(model_registry.aliases, self.settings.tracking_uri, self._name))
        if named is not None:
            await self._tried(self._follow_champion(named))
            await self._tried(self._follow_challenger(named))

    async def tell(self, tell: Tell) -> None:
        """Tell the replicas, and judge the challenger by what they say.

        tell  gives a target to all replicas that can be reached, and their reports back
        """
        reports = await tell(self.target)
        for report in reports:
            if report.state == "failed":
                said = f"version {report.version} at replica {report.replica}: {report.problem}"
                self._failures.add(("load_failed", said))
            if report.state == CHAMPION and report.bundle_hash == self.target.champion.bundle_hash:
                self.target = replace(self.target, proven=self.target.champion)
        for step, said in sorted(self._failures - self._said):
            self._step(step, said)
        self._said = self._failures
        if self._rolled_back(reports):
            await tell(self.target)
            with suppress(TidarError):  # asked again before the next look, which says so
                await self._withdraw()

    async def _tried(self, lookup: Awaitable[Found]) -> Found | None:
        """The result of a lookup; None, and a failure to be logged, where it raises TidarError."""
        try:
            return await lookup
        except TidarError as error:
            self._failures.add(("lookup_failed", str(error)))
            return None

    async def _follow_champion(self, named: Mapping[str, int]) -> None:
        """Make the champion what its alias names. Raises TidarError, with the target as it was."""
        if (version := named.get(self._alias)) is None:
            raise TidarError(f"model {self._name} has no alias {self._alias!r} any more; tidar promote sets it again")
        if version == self.target.champion.version:
            return
        champion, self.card = await self._found(version)
        self._step("champion_changed", f"version {champion.label} after {self.target.champion.label}")
        self.target = replace(self.target, champion=champion)

    async def _follow_challenger(self, named: Mapping[str, int]) -> None:
        """Make the challenger what its alias names. Raises TidarError, with the target as it was."""
        if self.settings.challenger is None:
            return
        version = named.get(self.settings.challenger.alias)
        failed = self._withdrawn is not None and version == self._withdrawn[0]
        await self._try_out(None if failed or version == self.target.champion.version else version)

    async def _try_out(self, version: int | None) -> None:
        """Make that version the challenger."""
        before = self.target.challenger
        if version == (None if before is None else before.version):
            return
        challenger = None if version is None else (await self._found(version))[0]
        self._step("challenger_changed", f"version {_label(challenger)} after {_label(before)}")
        self.target, self._trial = replace(self.target, challenger=challenger), None

    async def _found(self, version: int) -> tuple[ModelVersion, ModelCard]:
        return await asyncio.to_thread(resolve_model, self.settings, f"models:/{self._name}/{version}")

    def _rolled_back(self, reports: Sequence[VersionReport]) -> bool:
        """Judge the challenger; True if it is the challenger no longer."""
        settings, champion, challenger = self.settings, self.target.champion, self.target.challenger
        if settings.challenger is None or challenger is None:
            return False
        if self._trial is None:
            self._trial = Since(reports)
        self._trial.update(reports)
        totals = [self._trial.totals(served.bundle_hash) for served in (challenger, champion)]
        why = failure(settings.challenger, *totals)
        if why is None:
            return False
        assert challenger.version is not None, "a challenger comes from the registry"
        self._step("challenger_rolled_back", f"version {challenger.label}: {why}")
        self._withdrawn = challenger.version, why
        self.target = replace(self.target, challenger=None)
        return True

    async def _withdraw(self) -> None:
        """Say in the registry what has failed."""
        if self._withdrawn is None or self.settings.challenger is None:
            return
        uri, alias = self.settings.tracking_uri, self.settings.challenger.alias
        await asyncio.to_thread(model_registry.withdraw, uri, self._name, alias, *self._withdrawn)
        self._withdrawn = None

    def _step(self, step: str, said: str) -> None:
        """Count it and log it."""
        self.steps[step] += 1
        logger.warning("model %s: %s: %s", self._name, step, said, extra={"model": self._name, "step": step})


def _label(served: ModelVersion | None) -> str:
    return "none" if served is None else served.label
