"""How do the pieces of texts become what a client reads: server-sent events, or one body?"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from serve_apps.answers import Choice, Completion, Logprobs, ModelCard
from serve_apps.errors import Problem
from serve_apps.pieces import Failed, Piece, Tally
from serve_apps.schemas import StreamOptions

__all__ = ["DONE", "Reply", "error_event", "interleave"]

DONE = "data: [DONE]\n\n"


@dataclass(slots=True, kw_only=True)
class Reply:
    """One response, from the pieces of all its choices."""

    completion_id: str
    card: ModelCard
    n: int = 1
    """Choices of a prompt, which is paid for once."""
    created: int = field(default_factory=lambda: int(time.time()))
    tallies: dict[int, Tally] = field(default_factory=dict)

    def chunk(self, index: int, piece: Piece, options: StreamOptions) -> str:
        """A server-sent event for a piece of choice `index`; empty if there is nothing in it to tell."""
        self.tallies[index] = piece.tally
        if not piece.text and piece.finish_reason is None:
            return ""
        chunk = self._completion([_choice(index, piece)])
        if options.continuous_usage_stats:
            chunk.usage = self.tally.usage()
        hidden = {"metrics"} if options.include_usage or options.continuous_usage_stats else {"metrics", "usage"}
        return f"data: {chunk.model_dump_json(exclude=hidden)}\n\n"

    def usage_chunk(self) -> str:
        """The server-sent event that says what the whole request cost."""
        chunk = self._completion([])
        chunk.usage, chunk.metrics = self.tally.usage(), self.tally.metrics()
        return f"data: {chunk.model_dump_json()}\n\n"

    def body(self, pieces: Iterable[tuple[int, Piece]]) -> Completion:
        """The whole response, of all pieces of all choices, each with the index of its choice."""
        choices: dict[int, Choice] = {}
        for index, piece in pieces:
            self.tallies[index] = piece.tally
            if index in choices:
                _add(choices[index], piece)
            else:
                choices[index] = _choice(index, piece)
        whole = self._completion([choices[index] for index in sorted(choices)])
        whole.usage, whole.metrics = self.tally.usage(), self.tally.metrics()
        return whole

    @property
    def tally(self) -> Tally:
        """Over all choices."""
        return sum((self._paid(*entry) for entry in self.tallies.items()), Tally())

    def _paid(self, index: int, tally: Tally) -> Tally:
        return tally if index % self.n == 0 else replace(tally, prompt_tokens=0)

    def _completion(self, choices: list[Choice]) -> Completion:
        return Completion(
            id=self.completion_id,
            created=self.created,
            model=self.card.id,
            system_fingerprint=self.card.fingerprint,
            choices=choices,
        )


def _choice(index: int, piece: Piece) -> Choice:
    return Choice(
        index=index,
        text=piece.text,
        logprobs=piece.logprobs,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        prompt_logprobs=piece.prompt_logprobs,
    )


def _add(choice: Choice, piece: Piece) -> None:
    choice.text += piece.text
    choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
    choice.prompt_logprobs = choice.prompt_logprobs or piece.prompt_logprobs
    if piece.logprobs is not None:
        so_far = choice.logprobs or Logprobs()
        lists = {name: getattr(so_far, name) + getattr(piece.logprobs, name) for name in Logprobs.model_fields}
        choice.logprobs = Logprobs(**lists)


def error_event(problem: Problem) -> str:
    """The server-sent event that ends a stream which cannot go on; no [DONE] follows it."""
    return f"data: {json.dumps(problem.body())}\n\n"


async def interleave(
    sources: Sequence[AsyncGenerator[Piece | Failed, None]],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of all sources as they come, each with the index of its source.

    The first failure is raised and ends all: a source that has not finished is closed before this returns.
    """
    queue: asyncio.Queue[tuple[int, Piece | Failed]] = asyncio.Queue()

    async def pump(index: int, source: AsyncGenerator[Piece | Failed, None]) -> None:
        finished = False
        try:
            async with aclosing(source) as events:
                async for event in events:
                    finished = isinstance(event, Failed) or event.finish_reason is not None
                    queue.put_nowait((index, event))
            assert finished, "a source ended before its text did"
        except Exception as error:
            queue.put_nowait((index, Failed(error)))

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    unfinished = len(tasks)
    try:
        while unfinished:
            index, event = await queue.get()
            if isinstance(event, Failed):
                raise event.error
            unfinished -= event.finish_reason is not None
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
