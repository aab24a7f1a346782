"""The HTTP routes of the service: OpenAI's API and probes.

The ingress: OpenAI's routes in front of a decoder deployment. It loads neither a model nor a tokenizer, so it runs on
any small node. Every refusal carries OpenAI's error envelope, whatever went wrong. Serve's proxy echoes X-Request-Id.
"""

import asyncio
import importlib.metadata
import logging
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
from serve_apps.api.tokenize_api import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from serve_apps.ingress import failover, translate
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.body_forwarding import ReplayBody
from serve_apps.ingress.generation_route import Generation
from serve_apps.ingress.graceful_drain import DrainGate, InFlightMiddleware
from serve_apps.ingress.playground import PAGE_HEADERS, page
from serve_apps.ingress.request_limits import Limits
from serve_apps.ingress.request_log import RequestLog
from serve_apps.ingress.translate import GenerationBody
from serve_apps.messages.replica_load import Load
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.messages.tokenizer_info import TokenizerInfo
from serve_apps.telemetry import start_stage
from serve_apps.telemetry.metrics import Counters, gauges
from serve_apps.telemetry.version_metrics import version_metrics
from tidar_core.errors import TidarError

__all__ = ["HttpApp"]

LOAD_SECONDS = 2.0
"""Time that /ready and /metrics wait for the replicas."""

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
        alias_watcher: DeploymentHandle | None = None,
        *,
        sleeps: bool = False,
        vllm_names: bool = False,
    ) -> None:
        """card           card of the model at the start; an alias watcher knows the present card
        alias_watcher  the deployment that follows an alias; `None` without an alias
        sleeps         the service may have no replica while there are no requests; a request starts a replica
        vllm_names     see `Counters`
        """
        self._decoder, self._card, self._limits, self._alias_watcher = decoder, card, limits, alias_watcher
        self._access, self._origins = access, list(origins)
        self._counters = Counters(card.id, vllm_names=vllm_names)
        self._generation = Generation(decoder, limits, self._counters)
        self._sleeps, self._gate = sleeps, DrainGate()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook for routes that know their deployment: the application with all routes."""
        api = FastAPI(
            title="TiDAR",
            version=_version(),
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            telemetry={"tracing": False},
        )
        add = api.add_api_route
        route = partial(add, dependencies=[Depends(self._admit)])
        route("/v1/completions", self.completions, methods=["POST"], response_model=Completion, responses=GENERATING)
        route("/v1/chat/completions", self.chat, methods=["POST"], response_model=ChatCompletion, responses=GENERATING)
        route("/v1/models", self.models, methods=["GET"], responses=PLAIN)
        route("/v1/models/{model_id:path}", self.model, methods=["GET"], responses=PLAIN | errors(404))
        route("/tokenize", self.tokenize, methods=["POST"], response_model=Tokenized, responses=READING)
        route("/detokenize", self.detokenize, methods=["POST"], response_model=Detokenized, responses=READING)
        route("/tokenizer_info", self.tokenizer_info, methods=["GET"], response_model=TokenizerInfo, responses=PLAIN)
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
        api.add_middleware(InFlightMiddleware, gate=self._gate)
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
        """Check a request before every route that reads or generates text."""
        try:
            self._gate.check()
            self._access.admit(http.headers)
        except TidarError as error:
            self._counters.count_answer(problem_of(error).status)
            raise

    async def completions(self, http: Request) -> Response:
        """Continue prompts."""
        return await self._counted(http, self._generate(http, CompletionRequest))

    async def chat(self, http: Request) -> Response:
        """Continue a conversation."""
        return await self._counted(http, self._generate(http, ChatRequest))

    async def models(self) -> ModelList:
        """List of the models: this service has one."""
        return ModelList(data=[await self._card_by_now()])

    async def model(self, model_id: str) -> ModelCard:
        """The model with that name."""
        self._check_model(model_id)
        return await self._card_by_now()

    async def tokenize(self, http: Request) -> Response:
        """Tokens of a prompt or of messages, as the completion routes encode them."""
        body = await self._limits.read(http, TokenizeRequest)
        self._check_model(body.model or self._card.id)
        call = partial(
            self._decoder.tokenize.remote,
            body.prompt_or_chat(), framed=body.add_special_tokens, spelled=body.return_token_strs,
        )  # fmt: skip
        tokenized = await self._limits.in_time(failover.answer(call), http.headers)
        if isinstance(tokenized, GenerationFailed):
            raise tokenized.error
        return JSONResponse(tokenized.model_dump(mode="json"))

    async def detokenize(self, http: Request) -> Response:
        """Text of tokens; special tokens appear by their names."""
        body = await self._limits.read(http, DetokenizeRequest)
        self._check_model(body.model or self._card.id)
        call = partial(self._decoder.detokenize.remote, body.tokens)
        text = await self._limits.in_time(failover.answer(call), http.headers)
        if isinstance(text, GenerationFailed):
            raise text.error
        return JSONResponse(Detokenized(prompt=text).model_dump(mode="json"))

    async def tokenizer_info(self, http: Request) -> Response:
        """Configuration of the tokenizer, and the chat template."""
        info = await self._limits.in_time(failover.answer(self._decoder.tokenizer_info.remote), http.headers)
        return JSONResponse(info.model_dump(mode="json"))

    async def health(self) -> dict[str, str]:
        """Status of this process, whatever the state of the decoder."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Status 200 while a replica is ready, or while a request would start a replica."""
        self._gate.check()
        if any(await self._of_replicas("ready", bool)):
            return JSONResponse({"status": "ready"})
        if self._sleeps:
            return JSONResponse({"status": "asleep"})
        stage = await asyncio.to_thread(start_stage.latest)
        state = "no decoder replica is ready" if stage is None else f"a decoder replica starts: {stage}"
        return _answer(HttpError(503, f"{state}; try again", {"Retry-After": "1"}))

    async def drain(self) -> int:
        """Refuse requests from now on. Returns the number of requests in flight."""
        self._gate.draining = True
        return self._gate.in_flight

    async def version(self) -> dict[str, str]:
        """The release of this code."""
        return {"version": _version()}

    async def metrics(self) -> Response:
        """Totals of this process for Prometheus, and the state of its decoder replicas."""
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
        """Results of a method of all replicas that answer in time. The call starts no replica."""
        try:
            results = self._decoder.broadcast(method).results_async(timeout_s=LOAD_SECONDS, return_exceptions=True)
            return [one for one in await results if isinstance(one, kind)]
        except Exception as error:  # Serve raises its own where there is no replica
            logger.info("no decoder replica answers %s: %s", method, error)
            return []

    async def _steps(self) -> dict[str, int]:
        """Counts of the changes of the served model; empty without an alias watcher."""
        if self._alias_watcher is None:
            return {}
        try:
            return await asyncio.wait_for(_awaited(self._alias_watcher.steps.remote()), LOAD_SECONDS)
        except Exception as error:
            logger.info("the alias watcher does not answer: %s", error)
            return {}

    async def _card_by_now(self) -> ModelCard:
        """Card of the version to be served; the last known card if the alias watcher does not answer."""
        if self._alias_watcher is not None:
            try:
                self._card = await asyncio.wait_for(_awaited(self._alias_watcher.card.remote()), LOAD_SECONDS)
            except Exception as error:
                logger.info("the alias watcher does not answer: %s", error)
        return self._card

    def _check_model(self, name: str) -> None:
        if name != self._card.id:
            raise ModelNotFoundError(
                f"model {name[:QUOTED_CHARS]!r} is not served here; this service has {self._card.id!r}"
            )

    async def _counted(self, http: Request, answering: Awaitable[Response]) -> Response:
        """Response to a request for text, which may be a refusal. It is counted."""
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
        """Response to a failure of a route that generates no text. The other routes count for themselves."""
        answer = _answer(error)
        self._counters.count_answer(answer.status_code)
        return answer

    async def _generate(self, http: Request, kind: type[GenerationBody]) -> Response:
        body: GenerationBody = await self._limits.read(http, kind)
        self._check_model(body.model)
        return await self._generation.answer(http, translate.open_reply(body, self._card), body)


async def _awaited(response: Any) -> Any:
    return await response


def _answer(error: BaseException) -> JSONResponse:
    problem = problem_of(error)
    return JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    return _answer(error)


async def _leave(_: Request, __: Exception) -> Response:
    """Response for the log alone: the client is gone."""
    return Response(status_code=CLIENT_GONE)


async def _refuse_route(http: Request, error: Exception) -> JSONResponse:
    """Response to a request for an unknown route or method."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path} is not served here: {error.detail}; see {ROUTES}"
    return _answer(HttpError(error.status_code, message, error.headers))


def _version() -> str:
    try:
        return importlib.metadata.version("tidar")
    except importlib.metadata.PackageNotFoundError:
        return "unreleased"
