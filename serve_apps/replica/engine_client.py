"""Client of an `Engine` in a child process, with the same methods.

Why another process? The event loop of the replica holds the interpreter lock, above all for Serve's streams. A decoder
in the same process would wait for the lock many times a second. The messages of both processes
(`messages/engine_calls.py`) go over a pipe that only the two have. Either process ends with the
other, however the other ended.
"""

import asyncio
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

from serve_apps.api.tokenize_api import Tokenized
from serve_apps.messages.engine_calls import (
    CallFailed,
    CallResult,
    CancelCall,
    CheckHealth,
    Detokenize,
    EngineCall,
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
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.messages.tokenizer_info import TokenizerInfo
from serve_apps.replica.delta_queue import DeltaQueue, put_all
from serve_apps.rollout.model_version import ModelVersion

__all__ = ["EngineClient"]

logger = logging.getLogger("ray.serve")

STOP_SECONDS = 10.0
"""Time for a process to end after `StopEngine`."""


class EngineClient:
    """An engine in a process of its own."""

    def __init__(
        self,
        served: ModelVersion,
        lost: Callable[["EngineClient", str], None],
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Starts the process, and raises the error that the process meets while it loads.

        lost    called with this client and a message, in a thread of the client, when the process ends without having
                been stopped
        report  called with one line at the start of each stage, in a thread of the client
        """
        self.served, self._lost, self._report = served, lost, report
        self._texts: dict[int, DeltaQueue] = {}
        self._answers: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._stopping = False
        self._problem: str | None = "it has not begun"
        self._begun = threading.Event()
        self._connection, theirs = Pipe()
        self._thread = threading.Thread(target=self._run, args=(theirs,), name="engine", daemon=True)
        self._thread.start()
        self._send(served)
        self._begun.wait()
        if isinstance(self._first, StartFailed):
            self._thread.join()
            raise self._first.error
        self.tokenizer_info: TokenizerInfo = self._first.tokenizer_info
        self.tool_form = self._first.tool_form

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """See `Engine.generate`."""
        call, queue, finished = next(self._numbers), DeltaQueue(), False
        self._texts[call] = queue
        try:
            self._check()
            self._send(Generate(call, request))
            while not finished:
                delta = await queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if self._texts.pop(call, None) is not None and not finished:
                self._send(CancelCall(call))

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized:
        """See `Engine.tokenize`."""
        tokenized: Tokenized = await self._answer(Tokenize(next(self._numbers), prompt, framed, spelled))
        return tokenized

    async def detokenize(self, tokens: list[int]) -> str:
        """See `Engine.detokenize`."""
        text: str = await self._answer(Detokenize(next(self._numbers), tokens))
        return text

    async def load(self, replica: str) -> Load:
        """See `Engine.load`."""
        load: Load = await self._answer(GetLoad(next(self._numbers), replica))
        return replace(load, pid=os.getpid())

    async def load_drafts(self, served: ModelVersion) -> None:
        """See `Engine.load_drafts`."""
        await self._answer(LoadDrafts(next(self._numbers), served))
        self.served = served

    async def check_health(self) -> None:
        """See `Engine.check_health`. A process that does not answer is unhealthy too."""
        seconds = self.served.settings.hang_seconds * 7 / 6  # a little more than the process gives itself
        try:
            async with asyncio.timeout(seconds):
                await self._answer(CheckHealth(next(self._numbers)))
        except TimeoutError as error:
            raise RuntimeError(f"the decoder's process has not answered for {seconds:g} s") from error

    def stop(self) -> None:
        """End the process after the forward in flight; requests that still run fail."""
        self._stopping = True
        self._send(StopEngine())
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    async def _answer(self, message: Tokenize | Detokenize | GetLoad | CheckHealth | LoadDrafts) -> Any:
        """The result of a call. Raises what the process raised. Cancelled early, the call is cancelled there too."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._answers[message.call] = loop, answer
        try:
            self._check()
            self._send(message)
            return await answer
        finally:
            if self._answers.pop(message.call, None) is not None and not answer.done():
                self._send(CancelCall(message.call))

    def _check(self) -> None:
        """Raise RuntimeError if the process has ended."""
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def _send(self, message: EngineCall | ModelVersion) -> None:
        with self._sending, suppress(OSError):  # the reading thread reports a process that is gone
            self._connection.send(message)

    def _run(self, theirs: Connection) -> None:
        """Start the process and read its messages. The kernel ends it with this thread (PR_SET_PDEATHSIG)."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_apps.replica.engine_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        except OSError as error:
            self._note_start(StartFailed(error))
            return
        theirs.close()
        try:
            while True:
                self._receive(self._connection.recv())
        except (EOFError, OSError):
            pass  # the process has ended
        except Exception:
            logger.exception("a message of the decoder's process could not be handled, so the process is killed")
            self._process.kill()
        self._end(self._process.wait())

    def _receive(self, message: Any) -> None:
        match message:
            case TextDeltas():
                self._put(message.deltas)
            case CallResult():
                self._resolve(message.call, message.value, None)
            case CallFailed():
                self._resolve(message.call, None, message.error)
            case LogMessage():
                logging.getLogger(message.record.name).handle(message.record)
            case StageReached():
                self._report(message.line)
            case EngineStarted() | StartFailed():
                self._note_start(message)

    def _put(self, deltas: list[tuple[int, TextDelta | GenerationFailed]]) -> None:
        """Add deltas to their queues: one wake-up of each event loop."""
        by_loop = defaultdict(list)
        for call, delta in deltas:
            if (queue := self._texts.get(call)) is not None:
                by_loop[queue.loop].append((queue, delta))
        for loop, those in by_loop.items():
            put_all(loop, those)

    def _resolve(self, call: int, value: Any, error: Exception | None) -> None:
        if (waiting := self._answers.get(call)) is not None:
            loop, answer = waiting
            with suppress(RuntimeError):  # the event loop is closed: nobody waits
                loop.call_soon_threadsafe(_set, answer, value, error)

    def _note_start(self, first: EngineStarted | StartFailed) -> None:
        """Let the constructor go on: the process has loaded its bundle, or could not."""
        self._first = first
        if isinstance(first, EngineStarted):
            self._problem = None
        self._begun.set()

    def _end(self, code: int) -> None:
        """Fail all calls: the process has ended. `lost` comes first: if it ends the replica, a text never gets an error
        that another replica would have spared it."""
        self._connection.close()
        problem = f"the decoder's process has ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"
        if not self._begun.is_set():
            self._note_start(StartFailed(RuntimeError(problem)))
        elif not self._stopping and isinstance(self._first, EngineStarted):
            self._lost(self, problem)
        self._problem = problem
        self._put([(call, GenerationFailed(RuntimeError(problem))) for call in list(self._texts)])
        for call in list(self._answers):
            self._resolve(call, None, RuntimeError(problem))


def _set(answer: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)
