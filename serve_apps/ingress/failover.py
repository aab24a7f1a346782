"""What becomes of a text when its replica dies?

As long as the client was sent nothing of it, another replica writes it, or the one that takes the dead one's place. A
text of which something was sent cannot be begun again: it ends with one error.
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
"""Replicas that may die of one request; it could be what kills them."""
LOST = (RayActorError, AioRpcError)
"""What Serve raises of a replica that is gone: its own error where gRPC says UNAVAILABLE, gRPC's for its other codes.
What a replica itself raises never comes as either."""
GONE = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
RESET = "RST_STREAM"
"""gRPC's word for a connection that ended within a call; its code is INTERNAL."""

logger = logging.getLogger("ray.serve")


class Text:
    """One text, from whichever replica writes it."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        """ask  has Serve choose a replica; returns the stream of its pieces"""
        self._ask = ask
        self._attempt = 0
        self.told = False
        """The client was sent something of it. Whoever sends sets this."""

    def counts(self, piece: TextDelta) -> bool:
        """The replica that wrote `piece` still writes the text, or has ended it."""
        return piece.attempt == self._attempt

    async def pieces(self) -> AsyncGenerator[TextDelta | GenerationFailed, None]:
        """Pieces of the text; closing this frees its row in the replica."""
        for left in reversed(range(TRIES)):
            stream, finished = self._ask(), False
            try:
                async for piece in stream:
                    finished = isinstance(piece, GenerationFailed) or piece.finish_reason is not None
                    yield piece if isinstance(piece, GenerationFailed) or not self._attempt else self._again(piece)
                return
            except LOST as error:
                if finished:
                    return
                if not _is_lost(error):
                    raise
                finished = True  # nobody is left to be told that it is not wanted
                _give_up_or_go_on(error, told=self.told, left=left)
                self._attempt += 1
            finally:
                if not finished:
                    stream.cancel()

    def _again(self, piece: TextDelta) -> TextDelta:
        return piece._replace(attempt=self._attempt)


async def answer(ask: Callable[[], Any]) -> Any:
    """What a replica answers; one that dies of it is not the last to be asked."""
    left = TRIES
    while True:
        left -= 1
        try:
            return await ask()
        except LOST as error:
            if not _is_lost(error):
                raise
            _give_up_or_go_on(error, told=False, left=left)


def _is_lost(error: Exception) -> bool:
    """False for what gRPC says of a replica that lives, such as RESOURCE_EXHAUSTED of a message that is too large."""
    return not isinstance(error, AioRpcError) or error.code() in GONE or RESET in (error.details() or "")


def _give_up_or_go_on(error: Exception, *, told: bool, left: int) -> None:
    if told:
        raise ReplicaLostError("the replica that wrote this text has died; what was sent of it is all") from error
    if not left:
        raise ReplicaLostError(f"{TRIES} replicas have died with this request; it is not tried again") from error
    logger.warning("a replica has died; a text of which nothing was sent goes to another: %r", error)
