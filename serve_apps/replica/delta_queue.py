"""The way of text deltas from another thread to the event loop that reads them."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from serve_apps.messages.text_delta import GenerationFailed, TextDelta

__all__ = ["DeltaQueue", "put_all"]

Delta = TextDelta | GenerationFailed


class DeltaQueue:
    """The deltas of one text, for the event loop in which the queue was made."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._deltas = asyncio.Queue[Delta]()

    def put(self, delta: Delta) -> None:
        """Add a delta, from any thread."""
        put_all(self.loop, [(self, delta)])

    def put_here(self, delta: Delta) -> None:
        """Add a delta, in the event loop of the queue."""
        self._deltas.put_nowait(delta)

    async def get(self) -> TextDelta:
        """The next delta. Raises the error of a text that failed."""
        delta = await self._deltas.get()
        if isinstance(delta, GenerationFailed):
            raise delta.error
        return delta


def put_all(loop: asyncio.AbstractEventLoop, deltas: Sequence[tuple[DeltaQueue, Delta]]) -> None:
    """Add deltas to queues of one event loop, from any thread. The loop wakes up once for all of them."""
    with suppress(RuntimeError):  # the event loop is closed: nobody reads
        loop.call_soon_threadsafe(_put_here, deltas)


def _put_here(deltas: Sequence[tuple[DeltaQueue, Delta]]) -> None:
    for queue, delta in deltas:
        queue.put_here(delta)
