"""How does the service speak HTTP?

The ingress: OpenAI's routes in front of a decoder deployment. It loads neither a model nor a tokenizer, so it runs on
any small node. Every refusal carries OpenAI's error envelope, whatever went wrong. Serve's proxy echoes X-Request-Id.
"""

import asyncio
import importlib.metadata
import logging
import secrets
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_apps.api.chat_request import ChatRequest
from serve_apps.api.chat_response import ChatChunk, ChatCompletion
from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.completion_response import Completion, ModelCard, ModelList
from serve_apps.api.errors import CLIENT_GONE, QUOTED_CHARS, HttpError, ModelNotFoundError, ReplicaLostError, problem_of
from serve_apps.api.openapi import DOCS_PAGE, described, errors
from serve_apps.api.tokenize_api import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo
from serve_apps.ingress import failover
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.body_forwarding import ReplayBody
from serve_apps.ingress.generation_route import Generation
from serve_apps.ingress.graceful_drain import DrainGate, InFlightMiddleware
from serve_apps.ingress.playground import PAGE_HEADERS, page
from serve_apps.ingress.request_limits import Limits
from serve_apps.ingress.request_log import RequestLog
from serve_apps.messages.replica_load import Load
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.streaming.chat_stream import ChatReply
from serve_apps.streaming.completion_stream import CompletionReply
from serve_apps.telemetry import start_stage
from serve_apps.telemetry.metrics import Counters, gauges
from serve_apps.telemetry.version_metrics import version_metrics
from tidar_core.errors import TidarError

__all__ = ["HttpApp"]

LOAD_SECONDS = 2.0
"""How long /ready and /metrics wait for the replicas."""

ROUTES = "/v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /docs"
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
STREAMS = {"/v1/completions": Completion, "/v1/chat/completions": ChatChunk}
GENERATING = errors(400, 401, 404, 405, 408, 413, 429, 500, 503)
READING = errors(400, 401, 404, 405, 408, 413, 429, 500, 503)
PLAIN = errors(401, 405, 429, 500, 503)

logger = logging.getLogger("ray.serve")

Item = TypeVar("Item")


@serve.ingress()
class HttpApp:
    """The routes, over a handle to the decoder deployment."""

    def __init__(
        self,
        decoder: DeploymentHandle,
        card: ModelCard,
        limits: Limits,
        access: Access,
        origins: Sequence[str] = (),
        watcher: DeploymentHandle | None = None,
        *,
        sleeps: bool = False,
        vllm_names: bool = False,
    ) -> None:
        """card        of the model as it was at the start; the watcher, where there is one, knows what it is by now
        sleeps      there may be no replica while nobody asks; who asks wakes one
        vllm_names  see `Counters`
        """
        self._decoder, self._card, self._limits, self._watcher = decoder, card, limits, watcher
        self._access, self._origins = access, list(origins)
        self._counters = Counters(card.id, vllm_names=vllm_names)
        self._generation = Generation(decoder, limits, self._counters)
        self._sleeps, self._doorway = sleeps, DrainGate()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook for routes that know their deployment: all that the service answers."""
        api = FastAPI(
            title="TiDAR",
            version=_version(),
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            telemetry={"tracing": False},
        )
        add = api.add_api_route
        ask = partial(add, dependencies=[Depends(self._admit)])
        ask("/v1/completions", self.completions, methods=["POST"], response_model=Completion, responses=GENERATING)
        ask("/v1/chat/completions", self.chat, methods=["POST"], response_model=ChatCompletion, responses=GENERATING)
        ask("/v1/models", self.models, methods=["GET"], responses=PLAIN)
        ask("/v1/models/{model_id:path}", self.model, methods=["GET"], responses=PLAIN | errors(404))
        ask("/tokenize", self.tokenize, methods=["POST"], response_model=Tokenized, responses=READING)
        ask("/detokenize", self.detokenize, methods=["POST"], response_model=Detokenized, responses=READING)
        ask("/tokenizer_info", self.tokenizer_info, methods=["GET"], response_model=TokenizerInfo, responses=PLAIN)
        add("/health", self.health, methods=["GET"], responses=errors(405))
        add("/ready", self.ready, methods=["GET"], response_model=dict[str, str], responses=errors(405, 503))
        add("/version", self.version, methods=["GET"], responses=errors(405))
        add("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse, responses=errors(405))
        add("/docs", self.docs, methods=["GET"], include_in_schema=False)
        shown = page()
        add("/", lambda: HTMLResponse(shown, headers=PAGE_HEADERS), methods=["GET"], include_in_schema=False)
        api.add_middleware(ReplayBody)
        if self._origins:
            api.add_middleware(CORSMiddleware, allow_origins=self._origins, allow_methods=["*"], allow_headers=["*"])
        api.add_middleware(InFlightMiddleware, doorway=self._doorway)
        api.add_middleware(RequestLog)
        api.add_exception_handler(TidarError, _refuse)
        api.add_exception_handler(HTTPException, _refuse_route)
        api.add_exception_handler(ClientDisconnect, _leave)
        for failure in (ReplicaLostError, Exception):
            api.add_exception_handler(failure, self._fail)
        document = get_openapi(title=api.title, version=api.version, description=__doc__, routes=api.routes)
        document = described(document, BODIES, STREAMS, model_name=self._card.id, keyed=bool(self._access.keys))
        add("/openapi.json", lambda: JSONResponse(document), methods=["GET"], include_in_schema=False)
        return api

    async def _admit(self, http: Request) -> None:
        """Asked before every route that reads or writes text."""
        try:
            self._doorway.check()
            self._access.admit(http.headers)
        except TidarError as error:
            self._counters.count_answer(problem_of(error).status)
            raise

    async def completions(self, http: Request) -> Response:
        """Continue prompts."""
        return await self._counted(http, self._complete(http))

    async def chat(self, http: Request) -> Response:
        """Continue a conversation."""
        return await self._counted(http, self._converse(http))

    async def models(self) -> ModelList:
        """The models served here: one."""
        return ModelList(data=[await self._card_by_now()])

    async def model(self, model_id: str) -> ModelCard:
        """The model of that name."""
        self._check_model(model_id)
        return await self._card_by_now()

    async def tokenize(self, http: Request) -> Response:
        """The tokens of a prompt or of messages, as the completion routes read them."""
        asked = await self._limits.read(http, TokenizeRequest)
        self._check_model(asked.model or self._card.id)
        ask = partial(
            self._decoder.tokenize.remote,
            asked.asked(), framed=asked.add_special_tokens, spelled=asked.return_token_strs,
        )  # fmt: skip
        tokenized = await self._limits.in_time(failover.answer(ask), http.headers)
        if isinstance(tokenized, GenerationFailed):
            raise tokenized.error
        return JSONResponse(tokenized.model_dump(mode="json"))

    async def detokenize(self, http: Request) -> Response:
        """The text of tokens, special ones by their names."""
        asked = await self._limits.read(http, DetokenizeRequest)
        self._check_model(asked.model or self._card.id)
        ask = partial(self._decoder.detokenize.remote, asked.tokens)
        text = await self._limits.in_time(failover.answer(ask), http.headers)
        if isinstance(text, GenerationFailed):
            raise text.error
        return JSONResponse(Detokenized(prompt=text).model_dump(mode="json"))

    async def tokenizer_info(self, http: Request) -> Response:
        """What the tokenizer's configuration says, and the chat template."""
        info = await self._limits.in_time(failover.answer(self._decoder.tokenizer_info.remote), http.headers)
        return JSONResponse(info.model_dump(mode="json"))

    async def health(self) -> dict[str, str]:
        """This process lives; says nothing about the decoder."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """200 once a replica has loaded its model and run it, or where one would be woken; until the service ends."""
        self._doorway.check()
        if any(await self._of_replicas("ready", bool)):
            return JSONResponse({"status": "ready"})
        if self._sleeps:
            return JSONResponse({"status": "asleep"})
        stage = await asyncio.to_thread(start_stage.latest)
        state = "no decoder replica is ready" if stage is None else f"a decoder replica starts: {stage}"
        return _answer(HttpError(503, f"{state}; ask again", {"Retry-After": "1"}))

    async def drain(self) -> int:
        """Refuse requests from now on; says how many are still being answered."""
        self._doorway.closing = True
        return self._doorway.inside

    async def version(self) -> dict[str, str]:
        """The release of this code."""
        return {"version": _version()}

    async def metrics(self) -> Response:
        """Totals of this process for Prometheus, and what its decoder replicas are at."""
        loads, reports, steps = await asyncio.gather(
            self._of_replicas("load", Load), self._of_replicas("versions", list), self._steps()
        )
        versions = version_metrics(self._card.id, [report for each in reports for report in each], steps)
        text = self._counters.exposition() + gauges(self._card.id, loads) + versions
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def docs(self) -> Response:
        """A page that shows the OpenAPI document."""
        return HTMLResponse(DOCS_PAGE)

    async def _of_replicas(self, method: str, kind: type[Item]) -> list[Item]:
        """What all replicas that answer in time say; asking starts none."""
        try:
            told = self._decoder.broadcast(method).results_async(timeout_s=LOAD_SECONDS, return_exceptions=True)
            return [one for one in await told if isinstance(one, kind)]
        except Exception as error:  # Serve raises its own where there is no replica
            logger.info("no decoder replica answers %s: %s", method, error)
            return []

    async def _steps(self) -> dict[str, int]:
        """What has happened in the model's life, where somebody watches it."""
        if self._watcher is None:
            return {}
        try:
            return await asyncio.wait_for(_awaited(self._watcher.steps.remote()), LOAD_SECONDS)
        except Exception as error:
            logger.info("the watcher does not answer: %s", error)
            return {}

    async def _card_by_now(self) -> ModelCard:
        """Of the version that replicas are told to serve, as far as the watcher answers."""
        if self._watcher is not None:
            try:
                self._card = await asyncio.wait_for(_awaited(self._watcher.card.remote()), LOAD_SECONDS)
            except Exception as error:
                logger.info("the watcher does not answer: %s", error)
        return self._card

    def _check_model(self, name: str) -> None:
        if name != self._card.id:
            raise ModelNotFoundError(
                f"model {name[:QUOTED_CHARS]!r} is not served here; this service has {self._card.id!r}"
            )

    async def _counted(self, http: Request, answering: Awaitable[Response]) -> Response:
        """The answer, or the refusal, of a request for text."""
        try:
            answer = await answering
        except (ClientDisconnect, asyncio.CancelledError):  # a client that hangs up comes as either, as Serve has it
            self._counters.count_answer(CLIENT_GONE)
            self._counters.count_abandoned("body" if getattr(http.state, "reply", None) is None else "answer")
            raise
        except TidarError as error:
            answer = _answer(error)
        except Exception as error:
            logger.exception("a completion failed")
            answer = _answer(error)
        self._counters.count_answer(answer.status_code)
        return answer

    async def _fail(self, _: Request, error: Exception) -> Response:
        """A failure of a route that writes no text; the others count by themselves."""
        answer = _answer(error)
        self._counters.count_answer(answer.status_code)
        return answer

    async def _complete(self, http: Request) -> Response:
        asked = await self._limits.read(http, CompletionRequest)
        self._check_model(asked.model)
        reply = CompletionReply(
            reply_id=f"cmpl-{asked.request_id or secrets.token_hex(12)}",
            card=self._card, n=asked.n, options=asked.stream_options,
        )  # fmt: skip
        return await self._generation.answer(http, reply, asked)

    async def _converse(self, http: Request) -> Response:
        asked = await self._limits.read(http, ChatRequest)
        self._check_model(asked.model)
        reply = ChatReply(
            reply_id=f"chatcmpl-{asked.request_id or secrets.token_hex(12)}",
            card=self._card, n=asked.n, options=asked.stream_options, tools=asked.tool_use(),
        )  # fmt: skip
        return await self._generation.answer(http, reply, asked)


async def _awaited(response: Any) -> Any:
    return await response


def _answer(error: BaseException) -> JSONResponse:
    problem = problem_of(error)
    return JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    return _answer(error)


async def _leave(_: Request, __: Exception) -> Response:
    """Nobody reads it; the log has its status."""
    return Response(status_code=CLIENT_GONE)


async def _refuse_route(http: Request, error: Exception) -> JSONResponse:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path} is not served here: {error.detail}; see {ROUTES}"
    return _answer(HttpError(error.status_code, message, error.headers))


def _version() -> str:
    try:
        return importlib.metadata.version("tidar")
    except importlib.metadata.PackageNotFoundError:
        return "unreleased"
