"""The route of requests for text: a decoder replica generates each text, and the deltas become a response.

The response is one body, or the events of a stream.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property, partial
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve_apps.api.errors import problem_of
from serve_apps.ingress import failover
from serve_apps.ingress.request_limits import Limits
from serve_apps.ingress.translate import GenerationBody, routed_requests
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.text_delta import TextDelta
from serve_apps.streaming.completion_stream import DONE, Reply, error_event, interleave
from serve_apps.telemetry.metrics import Counters

__all__ = ["STREAM_HEADERS", "Generation"]

BY_GRPC: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
"""Deltas never go through Ray's object store, whatever the default of the process that made the handle."""
STREAM_HEADERS: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies such as nginx pass each event on at once, and caches keep no event."""

logger = logging.getLogger("ray.serve")

Pieces = AsyncGenerator[tuple[int, TextDelta], None]


class Generation:
    """The decoder deployment, from the point of view of an ingress."""

    def __init__(self, decoder: DeploymentHandle, limits: Limits, counters: Counters) -> None:
        self._decoder, self._limits, self._counters = decoder, limits, counters

    async def answer(self, http: Request, reply: Reply, body: GenerationBody) -> Response:
        """The response to a request whose body was read. Raises the error of a request that gets no text at all."""
        http.state.reply = reply  # for the log
        requests = routed_requests(body, http.headers, reply.reply_id)
        texts = [failover.Text(partial(self._generate, request)) for request in requests]
        pieces = self._counters.timed(interleave([text.deltas() for text in texts]), streamed=body.stream)
        timed = self._limits.timed(pieces, http.headers, len(texts))
        first = await _until_admitted(timed, len(texts))
        if body.stream:
            events = self._events(reply, texts, first, timed)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        async with aclosing(timed):
            items = [*first, *[item async for item in timed]]
        whole = reply.body((index, piece) for index, piece in items if texts[index].counts(piece))
        self._counters.count_tokens(reply.usage)
        return JSONResponse(whole)

    @cached_property
    def _generate(self) -> Callable[[GenerationRequest], Any]:
        """Choice of a replica by Serve. A call returns the stream of the replica's deltas."""
        generate: Callable[[GenerationRequest], Any] = self._decoder.options(stream=True, **BY_GRPC).generate.remote
        return generate

    async def _events(
        self, reply: Reply, texts: list[failover.Text], first: list[tuple[int, TextDelta]], pieces: Pieces
    ) -> AsyncGenerator[str, None]:
        """Server-sent events of a stream of texts, whose first deltas have come already."""
        stream, ended = _HeldEvents(reply, texts), False
        try:
            async with aclosing(pieces):
                for item in first:
                    stream.add(*item)
                if events := stream.take():
                    yield events
                async for index, piece in pieces:
                    stream.add(index, piece)
                    if events := stream.take():
                        yield events
            ended = True
            if reply.options.include_usage:
                stream.held += reply.usage_event()
            yield stream.held + DONE
        except Exception as error:
            logger.exception("a stream broke off")
            ended = True
            self._counters.count_break()
            yield stream.held + error_event(problem_of(error))
        finally:
            self._counters.count_tokens(reply.usage)
            if not ended:
                self._counters.count_abandoned("stream")


class _HeldEvents:
    """The events of one stream until they are sent."""

    def __init__(self, reply: Reply, texts: Sequence[failover.Text]) -> None:
        self._reply, self._texts, self._unfinished = reply, texts, len(texts)
        self.held = ""

    def add(self, index: int, delta: TextDelta) -> None:
        """Add the events of a delta, unless its replica has died and another one generates the text."""
        if not self._texts[index].counts(delta):
            return
        self.held += "".join(self._reply.events(index, delta))
        self._texts[index].sent = index in self._reply.sent
        self._unfinished -= delta.finish_reason is not None

    def take(self) -> str:
        """Events to be sent now. The last ones wait for the end of the stream: each message has a cost on its way."""
        if not self._unfinished:
            return ""
        events, self.held = self.held, ""
        return events


async def _until_admitted(pieces: Pieces, prompts: int) -> list[tuple[int, TextDelta]]:
    """Deltas up to the moment when all texts are admitted. An error until then still becomes a status."""
    first: list[tuple[int, TextDelta]] = []
    while len({index for index, _ in first}) < prompts:
        first.append(await anext(pieces))
    return first
