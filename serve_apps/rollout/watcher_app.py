"""Who looks after a registered model while it is served?

One small Serve deployment beside the decoders; without it a service serves what its alias named at the start.
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
"""Name of the deployment that is told."""
TELL_SECONDS = 10.0
"""How long a replica may take to hear what to serve; it loads afterwards."""

logger = logging.getLogger("ray.serve")


class WatcherApp:
    """The one replica that watches."""

    def __init__(self, served: ModelVersion, card: ModelCard) -> None:
        self._watch = AliasWatcher(served, card)
        self._seconds = served.settings.follow_alias_seconds or 0.0
        self._decoder: DeploymentHandle | None = None
        self._looked = asyncio.Event()
        self._looking = asyncio.get_running_loop().create_task(self._look_on())

    async def target(self) -> ServingTarget:
        """What a new replica shall serve, once the registry has been asked."""
        await self._looked.wait()
        return self._watch.target

    async def card(self) -> ModelCard:
        """The champion's."""
        return self._watch.card

    async def steps(self) -> dict[str, int]:
        """How often each thing has happened since this process began."""
        return dict(self._watch.steps)

    def check_health(self) -> None:
        """Raise if nobody looks any more."""
        if self._looking.done():
            raise RuntimeError("the watcher's task has ended")

    async def _look_on(self) -> None:
        while True:
            try:
                await self._watch.ask()
                self._looked.set()
                await self._watch.tell(self._tell)
            except Exception:  # the next look may fare better
                logger.exception("the watcher could not look")
            await asyncio.sleep(self._seconds)

    async def _tell(self, target: ServingTarget) -> Sequence[VersionReport]:
        """Tell all replicas that run; none is started for it."""
        try:
            if self._decoder is None:
                self._decoder = serve.get_deployment_handle(DECODER)
            told = self._decoder.broadcast("follow", target)
            answers = await told.results_async(timeout_s=TELL_SECONDS, return_exceptions=True)
        except Exception as error:  # Serve raises its own where there is no replica
            logger.info("no decoder replica hears what to serve: %s", error)
            return []
        return [report for answer in answers if isinstance(answer, list) for report in answer]
