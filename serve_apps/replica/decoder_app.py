"""What owns a share of a machine?

A Ray Serve replica: the engines of one device, which write all texts that are asked of it. Which weights they have is
the business of whoever watches the registry, of Serve's `user_config`, or settled at the start.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_apps.api.tokenize_api import Tokenized, TokenizerInfo
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load, together
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.messages.version_stats import VersionReport
from serve_apps.replica.autoscaling import stats
from serve_apps.replica.engine_pool import EnginePool
from serve_apps.rollout.model_version import ModelVersion, ServingTarget, resolve_model
from tidar_core.errors import ConfigError, TidarError

__all__ = ["DecoderApp"]

ASK_SECONDS = 60.0
"""How long a new replica waits to be told what to serve before it serves what the service was started with."""

logger = logging.getLogger("ray.serve")


class DecoderApp:
    """One replica of the decoder."""

    def __init__(
        self, served: ModelVersion, watcher: DeploymentHandle | None = None, *, configured: bool = False
    ) -> None:
        """watcher     knows what is to be served by now; without one it is `served`
        configured  Serve calls `reconfigure` before the first request, so nothing is loaded here
        """
        self._served, self._watcher = served, watcher
        self._name = secrets.token_hex(4)
        self.fleet = EnginePool(self._name)
        if watcher is None and not configured:
            self.fleet.start([served])

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's hook, at the start of a replica and for a config that has changed in its `user_config` alone.

        user_config  {"model": "models:/NAME@ALIAS"}, or any other MODEL; empty for the model of the settings. A new
                     replica loads that alone. A running one loads it beside the old weights, which go on if that
                     fails. Where the registry is watched, what the watcher says counts
        """
        target = await (self._configured(user_config) if self._watcher is None else self._told())
        if not self.fleet.writers:
            await asyncio.to_thread(self.fleet.start, [target.champion, *filter(None, [target.proven, self._served])])
        self.fleet.follow(target)
        if self._watcher is None:
            await self.fleet.followed()

    async def _configured(self, user_config: Mapping[str, Any]) -> ServingTarget:
        """What Serve's config names; where that cannot be found, what is served, or what the service started with."""
        try:
            if unknown := set(user_config) - {"model"}:
                raise ConfigError(f"user_config has {', '.join(sorted(unknown))}; it may have `model` alone")
            if "model" not in user_config:
                return ServingTarget(champion=self._served)
            served, _ = await asyncio.to_thread(resolve_model, self._served.settings, str(user_config["model"]))
        except TidarError as error:
            logger.warning("replica %s serves nothing new: user_config is %s: %s", self._name, user_config, error)
            return ServingTarget(champion=self.fleet.champion.served if self.fleet.writers else self._served)
        return ServingTarget(champion=served)

    async def follow(self, target: ServingTarget) -> list[VersionReport]:
        """Begin to serve `target`, beside what is written now; says how far that is, and how each version does."""
        self.fleet.follow(target)
        return self.fleet.reports()

    async def versions(self) -> list[VersionReport]:
        """How each version does here."""
        return self.fleet.reports()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | GenerationFailed, None]:
        """Pieces of the completion of `request`, the first once it is admitted, if need be without text.

        Closing the generator, or cancelling who waits on it, frees the row. An error that this project raises on
        purpose is the last event, so that it crosses the process border as itself.
        """
        try:
            with self.fleet.writer(request.route) as writer:
                async with aclosing(writer.pieces(request)) as pieces:
                    async for piece in pieces:
                        yield piece
        except TidarError as error:
            yield GenerationFailed(error)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized | GenerationFailed:
        """The tokens of a prompt, as `generate` reads it; with their names if they are wanted `spelled`."""
        try:
            return await self.fleet.champion.engine.tokenize(prompt, framed=framed, spelled=spelled)
        except TidarError as error:
            return GenerationFailed(error)

    async def detokenize(self, tokens: list[int]) -> str | GenerationFailed:
        """The text of tokens, special ones by their names."""
        try:
            return await self.fleet.champion.engine.detokenize(tokens)
        except TidarError as error:
            return GenerationFailed(error)

    async def tokenizer_info(self) -> TokenizerInfo:
        """What the tokenizer's configuration says."""
        return self.fleet.champion.engine.tokenizer_info

    async def ready(self) -> bool:
        """True: whoever can be asked has loaded its model and run it once."""
        return True

    async def load(self) -> Load:
        """How busy this replica is."""
        return together(await self._loads())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the policy is to know of this replica."""
        return stats(await self._loads())

    async def check_health(self) -> None:
        """Serve's hook: raise if this replica should be replaced, as one that does not decode."""
        await self.fleet.check_health()

    async def _loads(self) -> list[Load]:
        """Of all engines, the champion's first; one beside it that is ending, or has died, counts for nothing."""
        first, *others = self.fleet.writers
        loads = [await first.engine.load(self._name)]
        for writer in others:
            with suppress(RuntimeError):
                loads.append(await writer.engine.load(self._name))
        return loads

    async def _told(self) -> ServingTarget:
        """By the watcher, or what the service was started with."""
        assert self._watcher is not None
        try:
            return await asyncio.wait_for(_awaited(self._watcher.target.remote()), ASK_SECONDS)
        except Exception as error:
            logger.warning("replica %s does not hear what to serve, and begins with the old: %r", self._name, error)
            return ServingTarget(champion=self._served)


async def _awaited(response: Any) -> Any:
    return await response
