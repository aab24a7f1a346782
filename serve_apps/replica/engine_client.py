"""How does a replica speak with an engine that has a process of its own?

Whatever the replica does, Serve's streams above all, takes the interpreter from who else is in its process; a decoder
there waits for it many times a second. So the engine is elsewhere (`engine_child`), and the replica hands on what it
says. Calls go out by number, over a pipe that only the two have; each is answered by items and an end. Either process
ends with the other, however that one ended.
"""

import asyncio
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

from serve_apps.api.tokenize_api import Tokenized, TokenizerInfo
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load
from serve_apps.replica.engine import Heard
from serve_apps.rollout.model_version import ModelVersion

__all__ = ["BEGUN", "DROP", "LOG", "STAGE", "STOP", "End", "EngineClient"]

DROP, STOP = "drop", "stop"
"""Said of a call that nobody waits for any more, and to the process."""
LOG, BEGUN, STAGE = -1, -2, -3
"""In the place of a call's number: a record for this process' log, what the engine is or why there is none, and a line
about the stage that the start has reached."""
STOP_SECONDS = 10.0
"""How long a process that is told to end may take."""


@dataclass(frozen=True, slots=True)
class End:
    """The last answer to a call."""

    error: Exception | None


@dataclass(slots=True)
class _Call:
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def tell(self, answer: Any) -> None:
        with suppress(RuntimeError):  # its event loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)


class EngineClient:
    """An `Engine` elsewhere; what it has of it says the same."""

    def __init__(
        self, served: ModelVersion, lost: Callable[[str], None], report: Callable[[str], None] = lambda line: None
    ) -> None:
        """Starts the process, and raises what it meets while it loads.

        lost    told the error, in a thread of its own, when the process ends without having been told to
        report  takes one line at the start of each stage, in a thread of its own
        """
        self.served, self._lost, self._report = served, lost, report
        self._calls: dict[int, _Call] = {}
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
        if isinstance(self._first, Exception):
            self._thread.join()
            raise self._first
        self.tokenizer_info, self.tool_form = self._first

    def steps(self, asked: GenerationRequest) -> AsyncGenerator[Heard, None]:
        """See `Engine.steps`."""
        return self._answers("steps", asked)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized:
        """See `Engine.tokenize`."""
        tokenized: Tokenized = await self._answer("tokenize", prompt, framed=framed, spelled=spelled)
        return tokenized

    async def detokenize(self, tokens: list[int]) -> str:
        """See `Engine.detokenize`."""
        return str(await self._answer("detokenize", tokens))

    async def load(self, replica: str) -> Load:
        """See `Engine.load`."""
        load: Load = await self._answer("load", replica)
        return replace(load, pid=os.getpid())

    async def check_health(self) -> None:
        """See `Engine.check_health`; a process that says nothing is no better than one whose decoder hangs."""
        seconds = self.served.settings.hang_seconds * 7 / 6  # a little more than the process gives itself
        try:
            async with asyncio.timeout(seconds):
                await self._answer("check_health")
        except TimeoutError as error:
            raise RuntimeError(f"the decoder's process has not answered for {seconds:g} s") from error

    def stop(self) -> None:
        """End the process after the forward in flight; requests that still run fail."""
        self._stopping = True
        self._send(STOP)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    async def _answer(self, name: str, *arguments: Any, **named: Any) -> Any:
        async with aclosing(self._answers(name, *arguments, **named)) as answers:
            return await anext(answers, None)

    async def _answers(self, name: str, *arguments: Any, **named: Any) -> AsyncGenerator[Any, None]:
        """What the process says to one call. Raises what it raised. Closed early, the call is dropped."""
        number, call = next(self._numbers), _Call(asyncio.get_running_loop())
        self._calls[number] = call
        try:
            if self._problem is not None:
                raise RuntimeError(self._problem)
            self._send((number, name, arguments, named))
            while True:
                answer = await call.answers.get()
                if isinstance(answer, End):
                    del self._calls[number]
                    if answer.error is not None:
                        raise answer.error
                    return
                yield answer
        finally:
            if self._calls.pop(number, None) is not None:
                self._send((number, DROP, (), {}))

    def _send(self, message: Any) -> None:
        with self._sending, suppress(OSError):  # a process that is gone is told of by who reads
            self._connection.send(message)

    def _run(self, theirs: Connection) -> None:
        """Start the process and hear it out: its life is this thread's, as its kernel sees it (PR_SET_PDEATHSIG)."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_apps.replica.engine_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        except OSError as error:
            self._hear(error)
            return
        theirs.close()
        try:
            while True:
                number, answer = self._connection.recv()
                if number == LOG:
                    logging.getLogger(answer.name).handle(answer)
                elif number == STAGE:
                    self._report(answer)
                elif number == BEGUN:
                    self._hear(answer)
                elif (call := self._calls.get(number)) is not None:
                    call.tell(answer)
        except (EOFError, OSError):
            self._end(self._process.wait())

    def _hear(self, first: tuple[TokenizerInfo, str | None] | Exception) -> None:
        """The process has loaded its bundle, or could not."""
        self._first = first
        if not isinstance(first, Exception):
            self._problem = None
        self._begun.set()

    def _end(self, code: int) -> None:
        """The process has ended: so have its calls. `lost` comes first, for it may end the replica before a text is
        told an error that another replica would have spared it."""
        self._connection.close()
        problem = f"the decoder's process has ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"
        if not self._begun.is_set():
            self._hear(RuntimeError(problem))
        elif not self._stopping and not isinstance(self._first, Exception):
            self._lost(problem)
        self._problem = problem
        for call in list(self._calls.values()):
            call.tell(End(RuntimeError(problem)))
