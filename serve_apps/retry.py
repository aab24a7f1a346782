"""What becomes of a text when its replica dies?

As long as nobody has read any of it, another replica writes it, or the one that takes the dead one's place. A text of
which something was told cannot be begun again: it ends with one error.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError

from serve_apps.errors import ReplicaLostError
from serve_apps.pieces import Failed, Piece

__all__ = ["TRIES", "answer", "pieces"]

TRIES = 3
"""Replicas that may die of one request; it could be what kills them."""
LOST = (RayActorError, AioRpcError)
"""What Serve raises of a replica that is gone: its own error where gRPC says UNAVAILABLE, gRPC's for its other codes.
What a replica itself raises never comes as either."""

logger = logging.getLogger("ray.serve")


async def pieces(ask: Callable[[], Any]) -> AsyncGenerator[Piece | Failed, None]:
    """Pieces of one text, from whichever replica; closing this frees its row there.

    ask  has Serve choose a replica; gives the stream of what it says
    """
    told = False
    for left in reversed(range(TRIES)):
        stream, finished = ask(), False
        try:
            async for piece in stream:
                finished = isinstance(piece, Failed) or piece.finish_reason is not None
                told = told or finished or bool(piece.text) or piece.tally.completion_tokens > 0
                yield piece
            return
        except LOST as error:
            if finished:
                return
            finished = True  # nobody is left to be told that it is not wanted
            _give_up_or_go_on(error, told=told, left=left)
        finally:
            if not finished:
                stream.cancel()


async def answer(ask: Callable[[], Any]) -> Any:
    """What a replica answers; one that dies of it is not the last to be asked."""
    left = TRIES
    while True:
        left -= 1
        try:
            return await ask()
        except LOST as error:
            _give_up_or_go_on(error, told=False, left=left)


def _give_up_or_go_on(error: Exception, *, told: bool, left: int) -> None:
    if told:
        raise ReplicaLostError("the replica that wrote this text has died; what was told of it is all") from error
    if not left:
        raise ReplicaLostError(f"{TRIES} replicas have died with this request; it is not tried again") from error
    logger.warning("a replica has died; a request of which nothing was told goes to another: %r", error)
