"""The engines of a replica, and their change without dropping a text.

A replica has the champion's engine, and may have a challenger's. New weights are loaded beside the old ones and run
once. Then new texts go to them, and the old engine ends with its last text. So a replica needs memory for one engine
more than it serves. It waits for an engine that is leaving before it loads another. A version that cannot be loaded
changes only the report.

Drafts of the same frozen checkpoint are exchanged in the champion's engine, in no new memory. Both versions then share
this engine: texts in flight end under the version with which they began.
"""

import asyncio
import gc
import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve_apps.api.errors import ParameterError
from serve_apps.messages.version_routing import CHALLENGER, CHAMPION, Route, role_of
from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.replica.engine_client import EngineClient
from serve_apps.replica.text_generator import TextGenerator
from serve_apps.rollout.model_version import ModelVersion, ServingTarget
from serve_apps.telemetry import start_stage
from tidar_core.errors import TidarError
from tidar_core.timing import Clock

if TYPE_CHECKING:
    from serve_apps.replica.engine import Engine

__all__ = ["EnginePool"]

RETRY_SECONDS = 300.0
"""Time until a bundle that could not be loaded is tried again."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class _Problem:
    message: str
    since: float


class EnginePool:
    """The engines of one replica. All methods but `start` belong to its event loop."""

    def __init__(self, replica: str, clock: Clock = time.monotonic) -> None:
        """clock  seconds, ascending"""
        self._replica, self._clock = replica, clock
        self._generators: dict[str, TextGenerator] = {}
        """Generators by the hash of their bundles, leaving ones included."""
        self._roles: dict[str, str] = {}
        """Hash of the bundle that has each role."""
        self._problems: dict[str, _Problem] = {}
        self._known: dict[str, tuple[ModelVersion, VersionStats]] = {}
        """Every version that was ever to be loaded, with its counts."""
        self._target: ServingTarget | None = None
        self._reached: ServingTarget | None = None
        self._loading: ModelVersion | None = None
        self._work: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        """An engine has ended, or the target has changed: look again."""

    @property
    def champion(self) -> TextGenerator:
        """Generator of the champion, which answers by default."""
        return self._generators[self._roles[CHAMPION]]

    @property
    def engines(self) -> "tuple[Engine | EngineClient, ...]":
        """All engines, the champion's first; empty before the start."""
        return tuple({id(generator.engine): generator.engine for generator in self.generators}.values())

    @property
    def generators(self) -> tuple[TextGenerator, ...]:
        """All generators, the champion first; empty before the start."""
        champion = self._roles.get(CHAMPION)
        return tuple(self._generators[key] for key in sorted(self._generators, key=lambda key: key != champion))

    def start(self, candidates: Sequence[ModelVersion]) -> None:
        """Load the first candidate that can be loaded. Raises the error of the first candidate if all fail."""
        errors = []
        for served in candidates:
            if served.bundle_hash in self._problems:
                continue
            made = self._made(served, self._totals(served))
            self._keep(served, made)
            if not isinstance(made, Exception):
                self._roles[CHAMPION] = served.bundle_hash
                return
            errors.append(made)
        raise errors[0]

    @contextmanager
    def lease(self, route: Route) -> Iterator[TextGenerator]:
        """The generator for a request. Its engine stays for as long as the context is open."""
        generator = self._generators[self._chosen(route)]
        generator.texts += 1
        try:
            yield generator
        finally:
            generator.texts -= 1
            self._end_unneeded()

    def follow(self, target: ServingTarget) -> None:
        """Begin to serve `target`. A loaded engine goes on; a version that failed is tried again at times."""
        now = self._clock()
        retry = [key for key, problem in self._problems.items() if now - problem.since > RETRY_SECONDS]
        for key in retry:
            del self._problems[key]
        if target == self._target and not retry:
            return
        self._target, self._reached = target, None
        self._left.set()
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._catch_up())

    async def followed(self) -> None:
        """Wait until the target is served, as far as it can be loaded."""
        if self._work is not None:
            await self._work

    async def check_health(self) -> None:
        """Raise if the champion does not decode. Another engine that does not decode is given up."""
        for generator in self.generators:
            bundle_hash = generator.served.bundle_hash
            if not self._holds(bundle_hash):
                continue  # its engine is checked for the version that it serves now
            try:
                await generator.engine.check_health()
            except Exception as error:
                if self._generators.get(bundle_hash) is not generator:
                    continue  # it has ended meanwhile, as it should
                if generator is self.champion:
                    raise
                self._give_up(bundle_hash, error)

    def reports(self) -> list[VersionReport]:
        """State and counts of every version that was here, is here, or is to come."""
        states = dict.fromkeys(self._known, "gone")
        states |= dict.fromkeys(self._problems, "failed") | dict.fromkeys(self._generators, "leaving")
        if self._loading is not None:
            states[self._loading.bundle_hash] = "loading"
        states |= {bundle_hash: role for role, bundle_hash in self._roles.items()}
        return [self._report(bundle_hash, state) for bundle_hash, state in states.items()]

    def _chosen(self, route: Route) -> str:
        """Hash of the bundle that answers a request."""
        challenger = self._roles.get(CHALLENGER)
        if challenger is None:
            if route.role == CHALLENGER:
                raise ParameterError("no challenger is served here now; drop the header x-tidar-version")
            return self._roles[CHAMPION]
        canary = self._generators[challenger].served.settings.challenger
        return self._roles[role_of(route, challenger, canary.weight if canary is not None else 0.0)]

    async def _catch_up(self) -> None:
        """Reach the target, which may change meanwhile."""
        while (target := self._target) is not None and target is not self._reached:
            wanted = {CHAMPION: target.champion, CHALLENGER: target.challenger}
            if self._roles.get(CHALLENGER) not in {s.bundle_hash for s in wanted.values() if s is not None}:
                self._take(CHALLENGER, None)  # its memory is given back first
            for role, served in wanted.items():
                if not await self._loaded(served, target):
                    break
                self._take(role, served)
            else:
                self._reached = target

    async def _loaded(self, served: ModelVersion | None, target: ServingTarget) -> bool:
        """Load a version, once no engine that leaves is in its way. Returns False if the target has changed by then."""
        if served is None or self._holds(served.bundle_hash):
            return True
        in_place = served is target.champion and served.shares_base(self.champion.served)
        self._end_unneeded()
        while self._elsewhere(served) if in_place else self._leaving():
            self._left.clear()
            await self._left.wait()
            if self._target is not target:
                return False
        if served.bundle_hash not in self._problems:
            self._loading = served
            totals = self._totals(served)
            work = self._exchanged(served, totals) if in_place else asyncio.to_thread(self._made, served, totals)
            made = await work
            self._loading = None
            self._keep(served, made)
        return self._target is target

    async def _exchanged(self, served: ModelVersion, totals: VersionStats) -> TextGenerator | Exception:
        """Give the champion's engine the drafts of `served`."""
        engine = self.champion.engine
        try:
            await engine.load_drafts(served)
        except Exception as error:  # a damaged file: the old drafts go on
            return error
        return self._generators.get(served.bundle_hash) or TextGenerator(served, engine, totals)

    def _elsewhere(self, served: ModelVersion) -> bool:
        """Whether texts of this version still run in another engine than the champion's."""
        generator = self._generators.get(served.bundle_hash)
        return generator is not None and generator.engine is not self.champion.engine

    def _holds(self, bundle_hash: str) -> bool:
        """Whether an engine has the weights of a bundle. An engine that has changed its drafts has them no more."""
        generator = self._generators.get(bundle_hash)
        return generator is not None and generator.engine.served.bundle_hash == bundle_hash

    def _keep(self, served: ModelVersion, made: TextGenerator | Exception) -> None:
        """Keep a generator, or the error of a bundle that could not be loaded."""
        if not isinstance(made, Exception):
            self._generators[served.bundle_hash] = made
            return
        self._problems[served.bundle_hash] = problem = _Problem(_in_words(made), self._clock())
        logger.warning("version %s of %s cannot be loaded: %s", served.label, served.bundle_uri, problem.message)

    def _totals(self, served: ModelVersion) -> VersionStats:
        """Counts of all engines that a version has had here."""
        _, totals = self._known.get(served.bundle_hash, (served, VersionStats()))
        self._known[served.bundle_hash] = served, totals
        return totals

    def _take(self, role: str, served: ModelVersion | None) -> None:
        """Give the role to the engine of `served`. If that engine is missing, the champion stays."""
        before = self._roles.get(role)
        if served is not None and self._holds(served.bundle_hash):
            self._roles[role] = served.bundle_hash
        elif role == CHALLENGER:
            self._roles.pop(role, None)
        if (now := self._roles.get(role)) != before:
            label = "none" if now is None else self._known[now][0].label
            was = "none" if before is None else self._known[before][0].label
            logger.warning("replica %s serves version %s as %s, after %s", self._replica, label, role, was)
        self._end_unneeded()

    def _give_up(self, bundle_hash: str, error: Exception) -> None:
        """End an engine that is broken: its texts would fail anyway."""
        self._problems[bundle_hash] = problem = _Problem(_in_words(error), self._clock())
        logger.warning("version %s is given up: %s", self._known[bundle_hash][0].label, problem.message)
        self._roles = {role: held for role, held in self._roles.items() if held != bundle_hash}
        asyncio.get_running_loop().run_in_executor(None, _end, self._generators.pop(bundle_hash).engine)
        self._left.set()

    def _wanted(self) -> set[str]:
        """Hashes of bundles that have a role, or are to have one."""
        target = self._target
        coming = [] if target is None else [target.champion, target.challenger]
        roles = set(self._roles.values())
        return roles | {served.bundle_hash for served in coming if served is not None}

    def _leaving(self) -> list[str]:
        wanted = self._wanted()
        return [key for key in self._generators if key not in wanted or not self._holds(key)]

    def _end_unneeded(self) -> None:
        """End engines that have no role and no text in flight, which frees their memory."""
        for bundle_hash in self._leaving():
            if not self._generators[bundle_hash].texts:
                engine = self._generators.pop(bundle_hash).engine
                if engine not in self.engines:
                    asyncio.get_running_loop().run_in_executor(None, _end, engine)
                self._left.set()

    def _made(self, served: ModelVersion, totals: VersionStats) -> TextGenerator | Exception:
        try:
            return TextGenerator(served, self._engine(served), totals)
        except Exception as error:  # out of memory, a damaged file: the old weights go on
            traceback.clear_frames(error.__traceback__)  # what was made so far is given back
            return error
        finally:
            start_stage.clear(self._replica)

    def _engine(self, served: ModelVersion) -> "Engine | EngineClient":
        if served.settings.own_process:
            return EngineClient(served, self._lost, self._report_stage)
        from serve_apps.replica import engine  # it loads torch

        return engine.Engine(served, self._report_stage)

    def _report_stage(self, line: str) -> None:
        logger.info("replica %s: %s", self._replica, line)
        start_stage.publish(self._replica, line)

    def _lost(self, engine: EngineClient, problem: str) -> None:
        """End the replica if the champion's process has died: its waiting texts go to other replicas at once, and
        Serve's next health check replaces it. Any other engine is given up at its next health check."""
        if self._roles and self.champion.engine is engine:
            logger.critical("replica %s ends: %s", self._replica, problem)
            logging.shutdown()
            os._exit(1)

    def _report(self, bundle_hash: str, state: str) -> VersionReport:
        served, totals = self._known[bundle_hash]
        problem = self._problems.get(bundle_hash)
        return VersionReport(
            replica=self._replica,
            version=served.label,
            fingerprint=served.fingerprint,
            bundle_hash=bundle_hash,
            state=state,
            problem="" if problem is None else problem.message,
            totals=replace(totals),
        )


def _end(engine: "Engine | EngineClient") -> None:
    engine.stop()
    gc.collect()  # frames in which torch made the weights refer to each other, and to the engine


def _in_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, TidarError) else f"{type(error).__name__}: {words}"
