"""How is a request for text answered?

Each of its texts is written by a decoder replica. Their pieces become one body, or the events of a stream.
"""

import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve_apps.api.chat_request import ChatRequest
from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.errors import problem_of
from serve_apps.ingress import failover
from serve_apps.ingress.request_limits import Limits
from serve_apps.messages.text_delta import TextDelta
from serve_apps.messages.version_routing import route_of
from serve_apps.streaming.completion_stream import DONE, Reply, error_event, interleave
from serve_apps.telemetry.metrics import Counters

__all__ = ["STREAM_HEADERS", "Generation"]

BY_GRPC: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
"""Pieces of text do not go through Ray's object store, whatever the process prefers in which the handle was made."""
STREAM_HEADERS: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""nginx and its like pass each event on at once, and caches keep none."""

logger = logging.getLogger("ray.serve")

Pieces = AsyncGenerator[tuple[int, TextDelta], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """The decoder, as an ingress sees it."""

    decoder: DeploymentHandle
    limits: Limits
    counters: Counters

    async def answer(self, http: Request, reply: Reply, asked: CompletionRequest | ChatRequest) -> Response:
        """The response to a request that was read. Raises what a client gets as a status."""
        http.state.reply = reply  # for the log
        route = route_of(http.headers, asked.user, reply.reply_id)
        name = f"{http.headers.get('x-request-id', '')}-{secrets.token_hex(4)}"  # a client may repeat its own
        prompts = [replace(prompt, route=route) for prompt in asked.prompts(name)]
        generate = self.decoder.options(stream=True, **BY_GRPC).generate.remote
        texts = [failover.Text(partial(generate, prompt)) for prompt in prompts]
        pieces = interleave([text.pieces() for text in texts])
        heard = self.counters.timed(pieces, streamed=asked.stream)
        timed = self.limits.timed(heard, http.headers, len(prompts))
        first = await _until_admitted(timed, len(prompts))
        if asked.stream:
            events = self._events(reply, texts, first, timed)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        async with aclosing(timed):
            items = [*first, *[item async for item in timed]]
        whole = reply.body((index, piece) for index, piece in items if texts[index].counts(piece))
        self.counters.count_tokens(reply.tally)
        return JSONResponse(whole)

    async def _events(
        self, reply: Reply, texts: list[failover.Text], first: list[tuple[int, TextDelta]], pieces: Pieces
    ) -> AsyncGenerator[str, None]:
        """Server-sent events of a stream of texts, whose first pieces are there already."""
        unfinished, events, ended = len(texts), "", False
        try:
            async with aclosing(pieces):
                async for index, piece in _chained(first, pieces):
                    if not texts[index].counts(piece):
                        continue
                    events += "".join(reply.events(index, piece))
                    texts[index].told = index in reply.told
                    unfinished -= piece.finish_reason is not None
                    if events and unfinished:  # the last ones go with the end: each message costs on its way
                        yield events
                        events = ""
            ended = True
            if reply.options.include_usage:
                events += reply.usage_event()
            yield events + DONE
        except Exception as error:
            logger.exception("a stream broke off")
            ended = True
            self.counters.count_break()
            yield events + error_event(problem_of(error))
        finally:
            self.counters.count_tokens(reply.tally)
            if not ended:
                self.counters.count_abandoned("stream")


async def _chained(first: list[tuple[int, TextDelta]], pieces: Pieces) -> Pieces:
    for item in first:
        yield item
    async for item in pieces:
        yield item


async def _until_admitted(pieces: Pieces, prompts: int) -> list[tuple[int, TextDelta]]:
    """Pieces up to the first one of the prompt that was admitted last; an error until then still has its status."""
    first: list[tuple[int, TextDelta]] = []
    while len({index for index, _ in first}) < prompts:
        first.append(await anext(pieces))
    return first
