"""What does the process of an engine do?

    python -m serve_apps.replica.engine_server FILE_DESCRIPTOR

It loads what it is told to, answers calls over the pipe, and ends when it is told to, or with the process that started
it (`engine_process`).
"""

import asyncio
import ctypes
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from serve_apps.replica.engine import Engine
from serve_apps.replica.engine_client import BEGUN, DROP, LOG, STAGE, STOP, End

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when the thread that started it has ended."""


class _Outbox:
    """What this process says, whichever thread says it. Serves as the queue of a log's handler."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:  # nobody is left to hear it
                os._exit(0)

    def put_nowait(self, record: logging.LogRecord) -> None:
        self.send((LOG, record))


def main(descriptor: int) -> None:
    """Live for as long as the process at the other end of the pipe wants it."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)  # sent to a whole group; the replica says when its texts have ended
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    outbox = _Outbox(connection)
    logging.getLogger().addHandler(QueueHandler(outbox))  # type: ignore[arg-type]
    try:
        engine = Engine(connection.recv(), report=lambda line: outbox.send((STAGE, line)))
    except Exception as error:
        outbox.send((BEGUN, _sendable(error)))
        return
    outbox.send((BEGUN, (engine.tokenizer_info, engine.tool_form)))
    asyncio.run(_answer_all(engine, connection, outbox))
    os._exit(0)  # nothing is left to be tidied up


async def _answer_all(engine: Engine, connection: Connection, outbox: _Outbox) -> None:
    loop, inbox, work = asyncio.get_running_loop(), asyncio.Queue[Any](), dict[int, asyncio.Task[None]]()
    threading.Thread(target=_listen, args=(connection, loop, inbox), daemon=True).start()
    while (message := await inbox.get()) != STOP:
        number, name, arguments, named = message
        if name == DROP:
            if number in work:
                work[number].cancel()
            continue
        answers = _answers(getattr(engine, name)(*arguments, **named))
        work[number] = loop.create_task(_answer(number, answers, outbox))
        work[number].add_done_callback(partial(_forget, work, number))
    engine.stop()


def _forget(work: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    del work[number]


def _listen(connection: Connection, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
    try:
        while True:
            loop.call_soon_threadsafe(inbox.put_nowait, connection.recv())
    except (EOFError, OSError):
        os._exit(0)


async def _answers(called: Any) -> AsyncGenerator[Any, None]:
    """One answer, or as many as there are."""
    if asyncio.iscoroutine(called):
        yield await called
        return
    async with aclosing(called):
        async for answer in called:
            yield answer


async def _answer(number: int, answers: AsyncGenerator[Any, None], outbox: _Outbox) -> None:
    error = None
    try:
        async with aclosing(answers):
            async for answer in answers:
                outbox.send((number, answer))
    except Exception as met:
        error = _sendable(met)
    finally:
        outbox.send((number, End(error)))


def _sendable(error: Exception) -> Exception:
    """The same error, or its words where it cannot cross to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
