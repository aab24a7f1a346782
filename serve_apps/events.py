"""How do decode steps become what a client reads: server-sent events, or one body?

A replica turns steps into pieces (`Transcript`), the ingress turns the pieces of all prompts of a request into chunks
or a completion (`Reply`). Only final tokens become text, and a character only when all its bytes have come.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from serve_apps.errors import Problem
from serve_apps.schemas import Choice, Completion, Metrics, ModelCard, SpeculativeDecoding, StreamOptions, Usage

if TYPE_CHECKING:
    from tidar_core.request import DecodeStep

__all__ = ["DONE", "Failed", "Piece", "Reply", "Tally", "Transcript", "error_event", "interleave"]

DONE = "data: [DONE]\n\n"

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Tally:
    """What prompts have cost so far, and how their drafts fared."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    histogram: tuple[int, ...] = ()
    """At index j, the decode steps in which j speculative tokens stood; K entries."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            tuple(a + b for a, b in zip_longest(self.histogram, other.histogram, fillvalue=0)),
        )

    def usage(self) -> Usage:
        """Tokens read and written."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )

    def metrics(self) -> Metrics | None:
        """How the drafts fared; None in the autoregressive mode, which has none."""
        spec_tokens, steps = len(self.histogram) - 1, sum(self.histogram)
        if spec_tokens < 1:
            return None
        accepted = sum(j * count for j, count in enumerate(self.histogram))
        return Metrics(
            speculative_decoding=SpeculativeDecoding(
                mean_acceptance_length=1 + accepted / steps if steps else 1.0,
                draft_acceptance_rate=accepted / (steps * spec_tokens) if steps else 0.0,
                acceptance_histogram=list(self.histogram),
                num_spec_steps=steps,
                num_accepted_draft_tokens=accepted,
                num_draft_tokens=steps * spec_tokens,
                num_spec_tokens=spec_tokens,
            )
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """What has come for one prompt since its last piece; the first says that it was admitted and may have no text."""

    text: str
    finish_reason: FinishReason | None
    """Set on the last piece."""
    tally: Tally


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a prompt that cannot be completed."""

    error: Exception


class TextStream(Protocol):
    """An incremental detokenizer: see `tidar_core.artifacts.tokenizer.TextStream`."""

    def push(self, token_id: int) -> str:
        """The text that is certain now."""

    def flush(self) -> str:
        """What was held back."""


class Transcript:
    """The text of one prompt's tokens, as they come."""

    def __init__(self, stream: TextStream, *, prompt_tokens: int, block_len: int) -> None:
        self._stream = stream
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._histogram = [0] * block_len
        self._text = ""
        self.finish_reason: Any = None

    def add(self, steps: "Iterable[DecodeStep]") -> Self:
        """Take in more steps. The token that stops a text is counted but is no part of it."""
        for step in steps:
            self._completion_tokens += len(step.token_ids)
            if step.verified > 1:
                self._histogram[step.accepted - 1] += 1
            spoken = step.token_ids[:-1] if step.finish_reason == "stop" else step.token_ids
            self._text += "".join(self._stream.push(token) for token in spoken)
            self.finish_reason = step.finish_reason
        if self.finish_reason is not None:
            self._text += self._stream.flush()
        return self

    @property
    def pending(self) -> bool:
        """There is something to tell the client."""
        return bool(self._text) or self.finish_reason is not None

    def take(self) -> Piece:
        """All since the last piece."""
        text, self._text = self._text, ""
        tally = Tally(self._prompt_tokens, self._completion_tokens, tuple(self._histogram))
        return Piece(text, self.finish_reason, tally)


@dataclass(slots=True, kw_only=True)
class Reply:
    """One response, from the pieces of all its prompts."""

    completion_id: str
    card: ModelCard
    created: int = field(default_factory=lambda: int(time.time()))
    tallies: dict[int, Tally] = field(default_factory=dict)

    def chunk(self, index: int, piece: Piece, options: StreamOptions) -> str:
        """A server-sent event for a piece of prompt `index`; empty if there is nothing in it to tell."""
        self.tallies[index] = piece.tally
        if not piece.text and piece.finish_reason is None:
            return ""
        chunk = self._completion([Choice(index=index, text=piece.text, finish_reason=piece.finish_reason)])
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
        """The whole response, of all pieces of all prompts, each with the index of its prompt."""
        choices: dict[int, Choice] = {}
        for index, piece in pieces:
            self.tallies[index] = piece.tally
            choice = choices.setdefault(index, Choice(index=index, text="", finish_reason=None))
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
        whole = self._completion([choices[index] for index in sorted(choices)])
        whole.usage, whole.metrics = self.tally.usage(), self.tally.metrics()
        return whole

    @property
    def tally(self) -> Tally:
        """Over all prompts."""
        return sum(self.tallies.values(), Tally())

    def _completion(self, choices: list[Choice]) -> Completion:
        return Completion(
            id=self.completion_id,
            created=self.created,
            model=self.card.id,
            system_fingerprint=self.card.fingerprint,
            choices=choices,
        )


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
