"""How does the service speak HTTP?

The ingress: OpenAI's routes in front of a decoder deployment. It loads neither a model nor a tokenizer, so it runs on
any small node. Every refusal carries OpenAI's error envelope, whatever went wrong. Serve's proxy echoes X-Request-Id.
"""

import asyncio
import importlib.metadata
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve_apps.answers import ModelCard, ModelList
from serve_apps.errors import HttpError, ModelNotFoundError, problem_of
from serve_apps.events import DONE, Reply, error_event, interleave
from serve_apps.metrics import Counters, gauges
from serve_apps.pieces import Failed, Piece
from serve_apps.reading import read_request
from serve_apps.replica_load import Load
from serve_apps.schemas import CompletionRequest, PromptRequest, StreamOptions
from tidar_core.errors import TidarError

__all__ = ["HttpApp"]

READY_SECONDS = 5.0
"""How long /ready waits for a replica before it says no."""

LOAD_SECONDS = 2.0
"""How long /metrics waits for the replicas."""

logger = logging.getLogger("ray.serve")

Pieces = AsyncGenerator[tuple[int, Piece], None]


@serve.ingress()
class HttpApp:
    """The routes, over a handle to the decoder deployment."""

    def __init__(self, decoder: DeploymentHandle, card: ModelCard) -> None:
        self._decoder, self._card = decoder, card
        self._counters = Counters(card.id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook for routes that know their deployment: all that the service answers."""
        api = FastAPI(title="TiDAR", version=_version(), docs_url=None, redoc_url=None, openapi_url=None)
        api.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        api.add_api_route("/v1/models", self.models, methods=["GET"])
        api.add_api_route("/v1/models/{model_id:path}", self.model, methods=["GET"])
        api.add_api_route("/health", self.health, methods=["GET"])
        api.add_api_route("/ready", self.ready, methods=["GET"], response_model=None)
        api.add_api_route("/version", self.version, methods=["GET"])
        api.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        api.add_exception_handler(TidarError, _refuse)
        api.add_exception_handler(HTTPException, _refuse_route)
        return api

    async def completions(self, http: Request) -> Response:
        """Continue prompts."""
        try:
            answer = await self._complete(read_request(await http.body()))
        except TidarError as error:
            answer = _answer(error)
        except Exception as error:
            logger.exception("a completion failed")
            answer = _answer(error)
        self._counters.count_answer(answer.status_code)
        return answer

    async def models(self) -> ModelList:
        """The models served here: one."""
        return ModelList(data=[self._card])

    async def model(self, model_id: str) -> ModelCard:
        """The model of that name."""
        self._check_model(model_id)
        return self._card

    async def health(self) -> dict[str, str]:
        """This process lives; says nothing about the decoder."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """200 once a replica has loaded its model and run it."""
        try:
            await asyncio.wait_for(_awaited(self._decoder.ready.remote()), READY_SECONDS)
        except Exception:
            return JSONResponse({"status": "no decoder replica is ready"}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def version(self) -> dict[str, str]:
        """The release of this code."""
        return {"version": _version()}

    async def metrics(self) -> Response:
        """Totals of this process for Prometheus, and what its decoder replicas are at."""
        text = self._counters.exposition() + gauges(self._card.id, await self._loads())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _loads(self) -> list[Load]:
        """Of all replicas that answer in time; asking starts none."""
        try:
            loads = self._decoder.broadcast("load").results_async(timeout_s=LOAD_SECONDS, return_exceptions=True)
            return [load for load in await loads if isinstance(load, Load)]
        except Exception as error:  # Serve raises its own where there is no replica
            logger.info("no decoder replica says how busy it is: %s", error)
            return []

    def _check_model(self, name: str) -> None:
        if name != self._card.id:
            raise ModelNotFoundError(f"model {name!r} is not served here; this service has {self._card.id!r}")

    async def _complete(self, request: CompletionRequest) -> Response:
        self._check_model(request.model)
        reply = Reply(completion_id=f"cmpl-{secrets.token_hex(12)}", card=self._card, n=request.n)
        prompts = request.prompts(reply.completion_id)
        pieces = interleave([self._generate(prompt) for prompt in prompts])
        first = await _until_admitted(pieces, len(prompts))
        if request.stream:
            events = self._events(reply, request.stream_options, first, pieces)
            return StreamingResponse(events, media_type="text/event-stream")
        async with aclosing(pieces):
            whole = reply.body([*first, *[item async for item in pieces]])
        self._counters.count_tokens(reply.tally)
        return JSONResponse(whole.model_dump(mode="json"))

    async def _events(
        self, reply: Reply, options: StreamOptions, first: list[tuple[int, Piece]], pieces: Pieces
    ) -> AsyncGenerator[str, None]:
        """Server-sent events of a stream whose first pieces are there already."""
        complete = False
        try:
            async with aclosing(pieces):
                for item in first:
                    if chunk := reply.chunk(*item, options):
                        yield chunk
                async for item in pieces:
                    if chunk := reply.chunk(*item, options):
                        yield chunk
            complete = True
            if options.include_usage:
                yield reply.usage_chunk()
            yield DONE
        except Exception as error:
            logger.exception("a stream broke off")
            yield error_event(problem_of(error))
        finally:
            self._counters.count_tokens(reply.tally)
            if not complete:
                self._counters.count_break()

    async def _generate(self, prompt: PromptRequest) -> AsyncGenerator[Piece | Failed, None]:
        """Pieces of one text from some replica; closing this frees its row there."""
        pieces: Any = self._decoder.options(stream=True).generate.remote(prompt)
        finished = False
        try:
            async for piece in pieces:
                finished = isinstance(piece, Failed) or piece.finish_reason is not None
                yield piece
        finally:
            if not finished:
                pieces.cancel()


async def _until_admitted(pieces: Pieces, prompts: int) -> list[tuple[int, Piece]]:
    """Pieces up to the first one of the prompt that was admitted last; an error until then still has its status."""
    first: list[tuple[int, Piece]] = []
    while len({index for index, _ in first}) < prompts:
        first.append(await anext(pieces))
    return first


async def _awaited(response: Any) -> Any:
    return await response


def _answer(error: BaseException) -> JSONResponse:
    problem = problem_of(error)
    return JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    return _answer(error)


async def _refuse_route(http: Request, error: Exception) -> JSONResponse:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path} is not served here: {error.detail}; see /v1/models and /v1/completions"
    return _answer(HttpError(error.status_code, message, error.headers))


def _version() -> str:
    try:
        return importlib.metadata.version("tidar")
    except importlib.metadata.PackageNotFoundError:
        return "unreleased"
