"""How do the pieces of texts become what a client reads: server-sent events, or one body?

What completions and chats have in common, and completions; chats: `chat_events`.
"""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve_apps.api.completion_response import Answer, Choice, Completion, Logprobs, ModelCard
from serve_apps.api.errors import Problem
from serve_apps.api.generation_fields import StreamOptions
from serve_apps.api.token_origins import Decoding
from serve_apps.messages.text_delta import GenerationFailed, TextDelta, UsageCounts

__all__ = ["DONE", "CompletionReply", "Reply", "error_event", "event", "interleave"]

DONE = "data: [DONE]\n\n"


@dataclass(slots=True, kw_only=True)
class Reply(ABC):
    """One response, from the pieces of all its choices."""

    reply_id: str
    card: ModelCard
    n: int = 1
    """Choices of a prompt, which is paid for once."""
    options: StreamOptions = field(default_factory=StreamOptions)
    created: int = field(default_factory=lambda: int(time.time()))
    tallies: dict[int, UsageCounts] = field(default_factory=dict)
    fingerprints: dict[int, str] = field(default_factory=dict)
    """Of the weights that write each choice."""
    told: set[int] = field(default_factory=set)
    """Choices of whose text an event has been made."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Of each choice: see `TextDelta.attempt`."""

    def events(self, index: int, piece: TextDelta) -> Iterator[str]:
        """Server-sent events for a piece of choice `index`; none if there is nothing in it to tell."""
        self._note(index, piece)
        for chunk in self._chunks(index, piece):
            if self.options.continuous_usage_stats:
                chunk["usage"] = self.tally.usage().model_dump()
            elif not self.options.include_usage:
                chunk.pop("usage")
            chunk.pop("metrics")
            yield event(chunk)

    def usage_event(self) -> str:
        """The server-sent event that says what the whole request cost."""
        return event(self._last_chunk().model_dump(mode="json"))

    def body(self, pieces: Iterable[tuple[int, TextDelta]]) -> dict[str, Any]:
        """The whole response, of all pieces of all choices, each with the index of its choice."""
        choices: dict[int, list[TextDelta]] = {}
        for index, piece in pieces:
            self._note(index, piece)
            choices.setdefault(index, []).append(piece)
        return self._whole([choices[index] for index in sorted(choices)])

    @property
    def tally(self) -> UsageCounts:
        """Over all choices."""
        return sum((self._paid(*entry) for entry in self.tallies.items()), UsageCounts())

    @abstractmethod
    def _chunks(self, index: int, piece: TextDelta) -> Iterator[dict[str, Any]]:
        """JSON of what a stream tells of a piece."""

    @abstractmethod
    def _last_chunk(self) -> Answer:
        """The chunk without choices."""

    @abstractmethod
    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        """JSON of the response, from the pieces of each choice."""

    def _paid(self, index: int, tally: UsageCounts) -> UsageCounts:
        return tally if index % self.n == 0 else tally._replace(prompt_tokens=0, cached_tokens=0)

    def _forget(self, index: int) -> None:
        """What came of a choice is void: its replica has died, and another begins it again."""
        self.tallies.pop(index, None)
        self.fingerprints.pop(index, None)

    def _note(self, index: int, piece: TextDelta) -> None:
        if piece.attempt > self.attempts.get(index, 0):
            self.attempts[index] = piece.attempt
            self._forget(index)
        self.tallies[index] = piece.tally
        if piece.fingerprint:
            self.fingerprints[index] = piece.fingerprint

    def _heading(self, index: int | None = None) -> dict[str, Any]:
        """Of what is said of choice `index`, or of all: weights may change between two choices of a response."""
        writers = self.fingerprints.values() if index is None else [self.fingerprints.get(index, "")]
        return {
            "id": self.reply_id,
            "created": self.created,
            "model": self.card.id,
            "system_fingerprint": "+".join(dict.fromkeys(writers)),
        }

    def _cost(self) -> dict[str, Any]:
        return {"usage": self.tally.usage(), "metrics": self.tally.metrics()}


class CompletionReply(Reply):
    """A response of /v1/completions."""

    def _chunks(self, index: int, piece: TextDelta) -> Iterator[dict[str, Any]]:
        if piece.text or piece.finish_reason is not None:
            self.told.add(index)
            yield Completion(**self._heading(index), choices=[_choice(index, [piece])]).model_dump(mode="json")

    def _last_chunk(self) -> Completion:
        return Completion(**self._heading(), **self._cost(), choices=[])

    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        told = [_choice(index, pieces) for index, pieces in enumerate(choices)]
        return Completion(**self._heading(), **self._cost(), choices=told).model_dump(mode="json")


def event(data: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_event(problem: Problem) -> str:
    """The server-sent event that ends a stream which cannot go on; no [DONE] follows it."""
    return event(problem.body())


def _choice(index: int, pieces: Sequence[TextDelta]) -> Choice:
    last = pieces[-1]
    told = [piece.logprobs for piece in pieces if isinstance(piece.logprobs, Logprobs)]
    logprobs = {name: [entry for each in told for entry in getattr(each, name)] for name in Logprobs.model_fields}
    ids = [piece.token_ids for piece in pieces if piece.token_ids is not None]
    ways = [piece.decoding for piece in pieces if piece.decoding is not None]
    decoding = {name: [entry for each in ways for entry in getattr(each, name)] for name in Decoding.model_fields}
    return Choice(
        index=index,
        text="".join(piece.text for piece in pieces),
        logprobs=Logprobs(**logprobs) if told else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), None),
        prompt_token_ids=next((list(p.prompt_token_ids) for p in pieces if p.prompt_token_ids is not None), None),
        token_ids=[token for each in ids for token in each] if ids else None,
        decoding=Decoding(**decoding) if ways else None,
    )


async def interleave(
    sources: Sequence[AsyncGenerator[TextDelta | GenerationFailed, None]],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Pieces of all sources as they come, each with the index of its source.

    The first failure is raised and ends all: a source that has not finished is closed before this returns.
    """
    queue: asyncio.Queue[tuple[int, TextDelta | GenerationFailed]] = asyncio.Queue()

    async def pump(index: int, source: AsyncGenerator[TextDelta | GenerationFailed, None]) -> None:
        finished = False
        try:
            async with aclosing(source) as events:
                async for event in events:
                    finished = isinstance(event, GenerationFailed) or event.finish_reason is not None
                    queue.put_nowait((index, event))
            assert finished, "a source ended before its text did"
        except Exception as error:
            queue.put_nowait((index, GenerationFailed(error)))

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    unfinished = len(tasks)
    try:
        while unfinished:
            index, event = await queue.get()
            if isinstance(event, GenerationFailed):
                raise event.error
            unfinished -= event.finish_reason is not None
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
