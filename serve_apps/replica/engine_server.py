"""The process of an engine: it loads one model version and answers calls over a pipe.

    python -m serve_apps.replica.engine_server FILE_DESCRIPTOR

It ends with a `StopEngine` message, or with the process that started it (`engine_client.py`). Deltas are sent by the
decoder's own thread, all of one forward in one message. All other work belongs to an event loop.
"""

import asyncio
import ctypes
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from serve_apps.messages.engine_calls import (
    CallFailed,
    CallResult,
    CancelCall,
    CheckHealth,
    Detokenize,
    EngineStarted,
    Generate,
    GetLoad,
    LoadDrafts,
    LogMessage,
    StageReached,
    StartFailed,
    StopEngine,
    TextDeltas,
    Tokenize,
)
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from tidar_core.garbage import rare_collection

if TYPE_CHECKING:
    from serve_apps.replica.engine import Engine

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when the thread that started it has ended."""


class _Outbox:
    """Sends messages to the replica, from any thread. Serves as the queue of a log handler."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._deltas: list[tuple[int, TextDelta | GenerationFailed]] = []

    def send(self, message: Any) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:  # the replica is gone
                os._exit(0)

    def put_nowait(self, record: logging.LogRecord) -> None:
        self.send(LogMessage(record))

    def add(self, call: int, delta: TextDelta | GenerationFailed) -> None:
        """Keep a delta for the next `flush`. Both belong to the decoder's thread."""
        self._deltas.append((call, delta))

    def flush(self) -> None:
        """Send all deltas since the last flush."""
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self.send(TextDeltas(deltas))


def main(descriptor: int) -> None:
    """Load the version that comes first, and answer calls until the replica stops this process."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)  # sent to a whole group; the replica decides when its texts have ended
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    outbox = _Outbox(connection)
    logging.getLogger().addHandler(QueueHandler(outbox))  # pyrefly: ignore[bad-argument-type]
    try:
        with rare_collection():
            from serve_apps.replica.engine import Engine  # it imports torch

            version = connection.recv()
            engine = Engine(version, report=lambda line: outbox.send(StageReached(line)), flush=outbox.flush)
    except Exception as error:
        outbox.send(StartFailed(_sendable(error)))
        return
    outbox.send(EngineStarted(engine.tokenizer_info, engine.tool_form))
    asyncio.run(_Calls(engine, connection, outbox).run())
    os._exit(0)  # nothing is left to be tidied up


class _Calls:
    """The calls in flight. Belongs to the event loop."""

    def __init__(self, engine: "Engine", connection: Connection, outbox: _Outbox) -> None:
        self._engine, self._connection, self._outbox = engine, connection, outbox
        self._cancel: dict[int, Callable[[], Any]] = {}
        """Functions that end a call early, by call."""
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Answer calls until `StopEngine`."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)
        await self._stopped.wait()
        self._engine.stop()

    def _read(self) -> None:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):  # the replica is gone
            os._exit(0)
        engine = self._engine
        match message:
            case Generate():
                self._begin(message.call, self._generate(message))
            case Tokenize():
                tokens = engine.tokenize(message.prompt, framed=message.framed, spelled=message.spelled)
                self._begin(message.call, self._answer(message.call, tokens))
            case Detokenize():
                self._begin(message.call, self._answer(message.call, engine.detokenize(message.tokens)))
            case GetLoad():
                self._begin(message.call, self._answer(message.call, engine.load(message.replica)))
            case CheckHealth():
                self._begin(message.call, self._answer(message.call, engine.check_health()))
            case LoadDrafts():
                self._begin(message.call, self._answer(message.call, engine.load_drafts(message.version)))
            case CancelCall():
                if (cancel := self._cancel.pop(message.call, None)) is not None:
                    cancel()
            case StopEngine():
                self._stopped.set()

    def _begin(self, call: int, work: Coroutine[Any, Any, None]) -> None:
        self._cancel[call] = asyncio.get_running_loop().create_task(work).cancel

    async def _answer(self, call: int, work: Coroutine[Any, Any, Any]) -> None:
        """Send the result of a call, or its error."""
        try:
            self._outbox.send(CallResult(call, await work))
        except Exception as error:
            self._outbox.send(CallFailed(call, _sendable(error)))
        finally:
            self._cancel.pop(call, None)

    async def _generate(self, message: Generate) -> None:
        """Start a text; the decoder's thread sends its deltas, and ends its call."""
        ended = threading.Event()

        def send(delta: TextDelta | GenerationFailed) -> None:
            if isinstance(delta, GenerationFailed):
                delta = GenerationFailed(_sendable(delta.error))
            self._outbox.add(message.call, delta)
            if isinstance(delta, GenerationFailed) or delta.finish_reason is not None:
                ended.set()
                self._cancel.pop(message.call, None)

        try:
            self._cancel[message.call] = await self._engine.submit(message.request, send)
        except Exception as error:
            self._cancel.pop(message.call, None)
            self._outbox.send(TextDeltas([(message.call, GenerationFailed(_sendable(error)))]))
        else:
            if ended.is_set():  # the text was faster than this event loop
                self._cancel.pop(message.call, None)


def _sendable(error: Exception) -> Exception:
    """The same error, or its words if it cannot cross to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
