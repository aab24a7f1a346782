"""The failover of texts and calls to another replica when their replica dies.

As long as no part of a text was sent to the client, another replica generates it, or the successor of the dead replica.
A text that was sent in part cannot begin again: it ends with one error.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError

from serve_apps.api.errors import ReplicaLostError
from serve_apps.messages.text_delta import GenerationFailed, TextDelta

__all__ = ["TRIES", "Text", "answer"]

TRIES = 3
"""Number of replicas that may die during one request: the request could be the cause."""
LOST = (RayActorError, AioRpcError)
"""Types of errors that Serve raises for a lost replica: Ray's error, or gRPC's. An error that a replica itself raises
never has these types."""
GONE = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
RESET = "RST_STREAM"
"""gRPC's detail of a connection that ended within a call; its code is INTERNAL."""

logger = logging.getLogger("ray.serve")


class Text:
    """A text, from the replica that generates it at the time."""

    def __init__(self, call: Callable[[], Any]) -> None:
        """call  has Serve choose a replica; returns the stream of the replica's deltas"""
        self._call = call
        self._attempt = 0
        self.sent = False
        """A part of the text was sent to the client. The sender sets this."""

    def counts(self, delta: TextDelta) -> bool:
        """Whether the replica that sent `delta` still generates the text, or has ended it."""
        return delta.attempt == self._attempt

    async def deltas(self) -> AsyncGenerator[TextDelta | GenerationFailed, None]:
        """Deltas of the text. Closing the generator frees the slot of the text in the replica."""
        for left in reversed(range(TRIES)):
            stream, finished = self._call(), False
            try:
                async for delta in stream:
                    finished = isinstance(delta, GenerationFailed) or delta.finish_reason is not None
                    yield delta if isinstance(delta, GenerationFailed) or not self._attempt else self._again(delta)
                return
            except LOST as error:
                if finished:
                    return
                if not _is_lost(error):
                    raise
                finished = True  # the replica is gone: there is no call to cancel
                _give_up_or_go_on(error, sent=self.sent, left=left)
                self._attempt += 1
            finally:
                if not finished:
                    stream.cancel()

    def _again(self, delta: TextDelta) -> TextDelta:
        return delta._replace(attempt=self._attempt)


async def answer(call: Callable[[], Any]) -> Any:
    """Result of one call of a replica. If the replica dies, another replica is called."""
    left = TRIES
    while True:
        left -= 1
        try:
            return await call()
        except LOST as error:
            if not _is_lost(error):
                raise
            _give_up_or_go_on(error, sent=False, left=left)


def _is_lost(error: Exception) -> bool:
    """Whether the replica is gone: Ray's error, gRPC's UNAVAILABLE or CANCELLED, or a connection that was reset.

    Other gRPC errors come from live replicas, such as RESOURCE_EXHAUSTED for a message that is too long.
    """
    return not isinstance(error, AioRpcError) or error.code() in GONE or RESET in (error.details() or "")


def _give_up_or_go_on(error: Exception, *, sent: bool, left: int) -> None:
    if sent:
        raise ReplicaLostError("the replica that wrote this text has died; what was sent of it is all") from error
    if not left:
        raise ReplicaLostError(f"{TRIES} replicas have died with this request; it is not tried again") from error
    logger.warning("a replica has died; a text of which nothing was sent goes to another: %r", error)
