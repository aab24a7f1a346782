"""Serve deployment of the alias watcher.

A small deployment beside the decoders. Without it a service keeps the version that its alias named at the start.
"""

import asyncio
import logging
from collections.abc import Sequence

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_apps.api.completion_response import ModelCard
from serve_apps.messages.version_stats import VersionReport
from serve_apps.rollout.alias_watcher import AliasWatcher
from serve_apps.rollout.model_version import ModelVersion, ServingTarget

__all__ = ["DECODER", "WatcherApp"]

DECODER = "decoder"
"""Name of the deployment that receives the target."""
SEND_SECONDS = 10.0
"""Timeout of sending the target to a replica; the replica loads the version afterwards."""

logger = logging.getLogger("ray.serve")


class WatcherApp:
    """Single replica that runs the alias watcher."""

    def __init__(self, served: ModelVersion, card: ModelCard) -> None:
        self._alias_watcher = AliasWatcher(served, card)
        self._seconds = served.settings.follow_alias_seconds or 0.0
        self._decoder: DeploymentHandle | None = None
        self._looked = asyncio.Event()
        self._looking = asyncio.get_running_loop().create_task(self._look_on())

    async def target(self) -> ServingTarget:
        """Versions that a new replica is to serve, after the first lookup in the registry."""
        await self._looked.wait()
        return self._alias_watcher.target

    async def card(self) -> ModelCard:
        """Card of the champion."""
        return self._alias_watcher.card

    async def steps(self) -> dict[str, int]:
        """Number of events of each kind since this process began."""
        return dict(self._alias_watcher.steps)

    def check_health(self) -> None:
        """Raise RuntimeError if the task that looks up the aliases has ended."""
        if self._looking.done():
            raise RuntimeError("the task of the alias watcher has ended; the replica must be restarted")

    async def _look_on(self) -> None:
        while True:
            try:
                await self._alias_watcher.look_up()
                self._looked.set()
                await self._alias_watcher.update_replicas(self._send)
            except Exception:  # the next lookup may succeed
                logger.exception("a lookup of the alias watcher failed")
            await asyncio.sleep(self._seconds)

    async def _send(self, target: ServingTarget) -> Sequence[VersionReport]:
        """Send the target to all running replicas and return their reports. Starts no replica."""
        try:
            if self._decoder is None:
                self._decoder = serve.get_deployment_handle(DECODER)
            sent = self._decoder.broadcast("follow", target)
            results = await sent.results_async(timeout_s=SEND_SECONDS, return_exceptions=True)
        except Exception as error:  # Serve raises exceptions of its own if there is no replica
            logger.info("no decoder replica received the target: %s", error)
            return []
        return [report for reports in results if isinstance(reports, list) for report in reports]
