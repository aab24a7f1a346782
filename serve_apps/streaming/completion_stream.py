"""The way from text deltas to a response of /v1/completions: server-sent events, or one body.

`Reply` is what completions and chats have in common. For chats see `chat_stream.py`.
"""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from serve_apps.api.completion_response import Answer, Choice, Completion, ModelCard, metrics_of, usage_of
from serve_apps.api.errors import Problem
from serve_apps.api.generation_fields import StreamOptions
from serve_apps.messages.text_delta import GenerationFailed, TextDelta, UsageCounts
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import Logprobs

__all__ = ["DONE", "CompletionReply", "Reply", "error_event", "event", "interleave"]

DONE = "data: [DONE]\n\n"
ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True, kw_only=True)
class Reply(ABC):
    """A response, made of the deltas of all its choices."""

    reply_id: str
    card: ModelCard
    n: int = 1
    """Choices of each prompt. A prompt counts once, whatever the number of its choices."""
    options: StreamOptions = field(default_factory=StreamOptions)
    created: int = field(default_factory=lambda: int(time.time()))
    usages: dict[int, UsageCounts] = field(default_factory=dict)
    fingerprints: dict[int, str] = field(default_factory=dict)
    """Fingerprint of the weights that generate each choice."""
    sent: set[int] = field(default_factory=set)
    """Choices with an event that has some of their text."""
    attempts: dict[int, int] = field(default_factory=dict)
    """`TextDelta.attempt` of each choice."""

    def events(self, index: int, delta: TextDelta) -> Iterator[str]:
        """Server-sent events of a delta of choice `index`. A delta without news has no event."""
        self._record(index, delta)
        for chunk in self._chunks(index, delta):
            if self.options.continuous_usage_stats:
                chunk["usage"] = usage_of(self.usage).model_dump()
            elif not self.options.include_usage:
                chunk.pop("usage")
            chunk.pop("metrics")
            yield event(chunk)

    def usage_event(self) -> str:
        """The server-sent event with the usage of the whole request."""
        return event(self._last_chunk().model_dump(mode="json"))

    def body(self, deltas: Iterable[tuple[int, TextDelta]]) -> dict[str, Any]:
        """The whole response, from all deltas of all choices, each with the index of its choice."""
        choices: dict[int, list[TextDelta]] = {}
        for index, delta in deltas:
            self._record(index, delta)
            choices.setdefault(index, []).append(delta)
        return self._whole([choices[index] for index in sorted(choices)])

    @property
    def usage(self) -> UsageCounts:
        """Usage of all choices together."""
        return sum((self._paid(*entry) for entry in self.usages.items()), UsageCounts())

    @abstractmethod
    def _chunks(self, index: int, delta: TextDelta) -> Iterator[dict[str, Any]]:
        """JSON of the chunks of a delta."""

    @abstractmethod
    def _last_chunk(self) -> Answer:
        """The last chunk, which has no choices."""

    @abstractmethod
    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        """JSON of the response, from the deltas of each choice."""

    def _paid(self, index: int, usage: UsageCounts) -> UsageCounts:
        return usage if index % self.n == 0 else usage._replace(prompt_tokens=0, cached_tokens=0)

    def _reset(self, index: int) -> None:
        """Drop the state of a choice: its replica has died, and another replica begins the text again."""
        self.usages.pop(index, None)
        self.fingerprints.pop(index, None)

    def _record(self, index: int, delta: TextDelta) -> None:
        if delta.attempt > self.attempts.get(index, 0):
            self.attempts[index] = delta.attempt
            self._reset(index)
        self.usages[index] = delta.usage
        if delta.fingerprint:
            self.fingerprints[index] = delta.fingerprint

    def _heading(self, index: int | None = None) -> dict[str, Any]:
        """First fields of a chunk of choice `index`, or of all choices: their weights may differ."""
        fingerprints = self.fingerprints.values() if index is None else [self.fingerprints.get(index, "")]
        return {
            "id": self.reply_id,
            "created": self.created,
            "model": self.card.id,
            "system_fingerprint": "+".join(dict.fromkeys(fingerprints)),
        }

    def _chunk(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """JSON of a chunk with one choice, its fields in the order of the response models. A chunk is made for every
        delta, so no model is built."""
        return {**self._heading(choice["index"]), "usage": None, "metrics": None, "object": kind, "choices": [choice]}

    def _cost(self) -> dict[str, Any]:
        return {"usage": usage_of(self.usage), "metrics": metrics_of(self.usage)}


class CompletionReply(Reply):
    """A response of /v1/completions."""

    def _chunks(self, index: int, delta: TextDelta) -> Iterator[dict[str, Any]]:
        if delta.text or delta.finish_reason is not None:
            self.sent.add(index)
            yield self._chunk("text_completion", _choice_json(index, delta))

    def _last_chunk(self) -> Completion:
        return Completion(**self._heading(), **self._cost(), choices=[])

    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        whole = [_choice(index, deltas) for index, deltas in enumerate(choices)]
        return Completion(**self._heading(), **self._cost(), choices=whole).model_dump(mode="json")


def event(data: Any) -> str:
    """A server-sent event."""
    return f"data: {ENCODE(data)}\n\n"


def error_event(problem: Problem) -> str:
    """The server-sent event that ends a failed stream. No [DONE] follows it."""
    return event(problem.body())


def _choice(index: int, deltas: Sequence[TextDelta]) -> Choice:
    last = deltas[-1]
    scored = [delta.logprobs for delta in deltas if isinstance(delta.logprobs, Logprobs)]
    logprobs = {name: [entry for each in scored for entry in getattr(each, name)] for name in Logprobs.model_fields}
    ids = [delta.token_ids for delta in deltas if delta.token_ids is not None]
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        logprobs=Logprobs(**logprobs) if scored else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), None),
        prompt_token_ids=next((list(p.prompt_token_ids) for p in deltas if p.prompt_token_ids is not None), None),
        token_ids=[token for each in ids for token in each] if ids else None,
        decoding=Decoding.joined([delta.decoding for delta in deltas if delta.decoding is not None]),
    )


def _choice_json(index: int, delta: TextDelta) -> dict[str, Any]:
    """JSON of the `Choice` of one delta."""
    return {
        "index": index,
        "text": delta.text,
        "logprobs": to_jsonable_python(delta.logprobs),
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
        "prompt_logprobs": to_jsonable_python(delta.prompt_logprobs or None),
        "prompt_token_ids": None if delta.prompt_token_ids is None else list(delta.prompt_token_ids),
        "token_ids": None if delta.token_ids is None else list(delta.token_ids),
        "decoding": to_jsonable_python(delta.decoding),
    }


async def interleave(
    sources: Sequence[AsyncGenerator[TextDelta | GenerationFailed, None]],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Deltas of all sources as they come, each with the index of its source.

    The first failure is raised and ends all: a source that has not finished is closed before this returns.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as deltas:
            async for delta in deltas:
                if isinstance(delta, GenerationFailed):
                    raise delta.error
                yield 0, delta
                if delta.finish_reason is not None:
                    return
        raise AssertionError("a source ended before its text did")
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
