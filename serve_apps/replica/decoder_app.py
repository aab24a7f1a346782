"""A Ray Serve replica of the decoder: the engines of one device, and the calls that they answer.

An alias watcher decides which weights they have, or Serve's `user_config`, or the start of the service.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_apps.api.tokenize_api import Tokenized
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load, together
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.messages.tokenizer_info import TokenizerInfo
from serve_apps.messages.version_stats import VersionReport
from serve_apps.replica.autoscaling import stats
from serve_apps.replica.engine_pool import EnginePool
from serve_apps.rollout.model_version import ModelVersion, ServingTarget, resolve_model
from tidar_core.errors import ConfigError, TidarError
from tidar_core.timing import Clock

__all__ = ["DecoderApp"]

TARGET_SECONDS = 60.0
"""Time that a new replica waits for its target. After that it serves the version with which the service started."""

logger = logging.getLogger("ray.serve")


class DecoderApp:
    """A replica of the decoder."""

    def __init__(
        self,
        served: ModelVersion,
        alias_watcher: DeploymentHandle | None = None,
        *,
        configured: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        """alias_watcher  knows the present target; without an alias watcher the target is `served`
        configured     Serve calls `reconfigure` before the first request, so nothing is loaded here
        clock          seconds, ascending, after which a bundle that could not be loaded is tried again
        """
        self._served, self._alias_watcher = served, alias_watcher
        self._name = secrets.token_hex(4)
        self.pool = EnginePool(self._name, clock)
        if alias_watcher is None and not configured:
            self.pool.start([served])

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's hook, at the start of a replica and for a config that has changed in its `user_config` alone.

        user_config  {"model": "models:/NAME@ALIAS"}, or any other MODEL; empty for the model of the settings. A new
                     replica loads only this model. A running replica loads it beside the old weights, and keeps
                     these if that fails. With an alias watcher, the target of the watcher counts
        """
        target = await (self._configured(user_config) if self._alias_watcher is None else self._watched_target())
        if not self.pool.generators:
            await asyncio.to_thread(self.pool.start, [target.champion, *filter(None, [target.proven, self._served])])
        self.pool.follow(target)
        if self._alias_watcher is None:
            await self.pool.followed()

    async def _configured(self, user_config: Mapping[str, Any]) -> ServingTarget:
        """Target in Serve's config. If it cannot be found: the version served now, or the version of the start."""
        try:
            if unknown := set(user_config) - {"model"}:
                raise ConfigError(f"user_config has {', '.join(sorted(unknown))}; it may have `model` alone")
            if "model" not in user_config:
                return ServingTarget(champion=self._served)
            served, _ = await asyncio.to_thread(resolve_model, self._served.settings, str(user_config["model"]))
        except TidarError as error:
            logger.warning("replica %s serves nothing new: user_config is %s: %s", self._name, user_config, error)
            return ServingTarget(champion=self.pool.champion.served if self.pool.generators else self._served)
        return ServingTarget(champion=served)

    async def follow(self, target: ServingTarget) -> list[VersionReport]:
        """Begin to serve `target`, beside the texts in flight. Returns the state and counts of each version."""
        self.pool.follow(target)
        return self.pool.reports()

    async def versions(self) -> list[VersionReport]:
        """State and counts of each version here."""
        return self.pool.reports()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationFailed, None]:
        """Deltas of the text of `request`, the first once it is admitted, possibly without text.

        Closing the generator, or cancelling its reader, frees the slot. An error that this project raises on purpose is
        the last item, so that it crosses the process border unchanged.
        """
        try:
            with self.pool.lease(request.route) as generator:
                async with aclosing(generator.generate(request)) as deltas:
                    async for delta in deltas:
                        yield delta
        except TidarError as error:
            yield GenerationFailed(error)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized | GenerationFailed:
        """Tokens of a prompt, as `generate` encodes it; with their names if `spelled` is set."""
        try:
            return await self.pool.champion.engine.tokenize(prompt, framed=framed, spelled=spelled)
        except TidarError as error:
            return GenerationFailed(error)

    async def detokenize(self, tokens: list[int]) -> str | GenerationFailed:
        """Text of tokens; special tokens appear by their names."""
        try:
            return await self.pool.champion.engine.detokenize(tokens)
        except TidarError as error:
            return GenerationFailed(error)

    async def tokenizer_info(self) -> TokenizerInfo:
        """Configuration of the tokenizer."""
        return self.pool.champion.engine.tokenizer_info

    async def ready(self) -> bool:
        """True: a replica that answers has loaded its model and run it once."""
        return True

    async def load(self) -> Load:
        """Load of this replica."""
        return together(await self._loads())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: the statistics for the autoscaling policy."""
        return stats(await self._loads())

    async def check_health(self) -> None:
        """Serve's hook: raise if this replica should be replaced, because it does not decode."""
        await self.pool.check_health()

    async def _loads(self) -> list[Load]:
        """Loads of all engines, the champion's first. Another engine that is ending, or has died, is left out."""
        first, *others = self.pool.engines
        loads = [await first.load(self._name)]
        for engine in others:
            with suppress(RuntimeError):
                loads.append(await engine.load(self._name))
        return loads

    async def _watched_target(self) -> ServingTarget:
        """Target of the alias watcher; if it does not answer, the version of the start."""
        assert self._alias_watcher is not None
        try:
            return await asyncio.wait_for(_awaited(self._alias_watcher.target.remote()), TARGET_SECONDS)
        except Exception as error:
            logger.warning(
                "replica %s gets no target from the alias watcher, and begins with the version of the start: %r",
                self._name,
                error,
            )
            return ServingTarget(champion=self._served)


async def _awaited(response: Any) -> Any:
    return await response
