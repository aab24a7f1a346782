"""Answers conversations with a decoder whose slots stay full across prompts, turns and units of work.

No threads and no Ray: the owner submits conversations, and calls `advance` for as long as `busy`. Between two forwards
new conversations may come in. Each answer is a request of its own, with the whole conversation so far as its prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pipelines.answers.job import AnswersJob
from pipelines.answers.prompts import ASSISTANT, Prompt, questions
from pipelines.answers.variants import Variant
from pipelines.packing.conversations import same_day
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.artifacts.model.latency_file import bundle_planner
from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat, turn_end_id
from tidar_core.artifacts.text.conversation import read_messages
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import AUTOREGRESSIVE, DraftConfig, mode_of
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.stop_strings import StopStrings, stop_tokens
from tidar_core.errors import ContextLengthError, RequestError

__all__ = ["Answer", "Answerer", "Conversation"]

MOST_WAITING = 2**31
"""The owner bounds how many conversations wait."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn of the assistant."""

    text: str
    tokens: int
    """Generated tokens, the end token included."""
    finish_reason: str
    """`stop`: it ended by itself or at a stop string; `length`: it reached max_tokens."""
    stop_reason: str | None
    """The stop string that ended it."""

    @property
    def message(self) -> dict[str, Any]:
        """The message of the assistant, with the marks that pack reads."""
        marks = {"finish_reason": self.finish_reason} | ({"stop_reason": self.stop_reason} if self.stop_reason else {})
        return {"content": self.text, "role": ASSISTANT} | marks


@dataclass(slots=True, eq=False)
class Conversation:
    """A prompt on its way to its answers."""

    prompt: Prompt
    variant: Variant
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The settled part of the conversation: messages of the prompt, and answers."""
    answers: list[Answer] = field(default_factory=list)
    fault: str | None = None
    """Why the next question could not be answered."""

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)


@dataclass(slots=True, eq=False)
class _Turn:
    """An answer while it is generated."""

    conversation: Conversation
    done: Callable[[Conversation], None]
    text: "_AnswerText"


class Answerer:
    """One decoder, and the conversations that it answers."""

    def __init__(self, bundle: Bundle, template: ChatTemplate, job: AnswersJob, *, uri: str) -> None:
        """uri  location of the bundle, which may have a latency table beside it"""
        self._tokenizer, self._template, self._job = bundle.tokenizer, template, job
        context_len = min(job.context_len, bundle.model.config.context_len)
        draft = DraftConfig(block_len=bundle.info.block_len)
        decoder = Decoder(bundle.model, draft, slots=job.batch, context_len=context_len)
        mode = mode_of(bundle.model.config, job.mode, default=AUTOREGRESSIVE)
        planner = bundle_planner(mode, uri, decoder, context_len)
        self._scheduler = Scheduler(decoder, planner, max_waiting=MOST_WAITING)
        turn_end = turn_end_id(template, bundle.tokenizer)
        named = stop_tokens(job.stop, bundle.tokenizer.special_ids)
        ends = (*bundle.end_ids, *(() if turn_end is None else (turn_end,)), *named)
        self._end_ids, self._named = tuple(dict.fromkeys(ends)), named
        self._turns: dict[str, _Turn] = {}
        self._ids = count()

    @property
    def busy(self) -> bool:
        """True while any conversation is not answered to its end."""
        return self._scheduler.busy

    def submit(self, conversation: Conversation, done: Callable[[Conversation], None]) -> None:
        """Answer a conversation; `done` is called with it in a later call of `advance`, or at once if it fits nowhere.

        A conversation ends before its last question if an answer is cut off, or if a question does not fit the context
        or the template.
        """
        history = self._next_question(conversation)
        if history is None:
            return done(conversation)
        try:
            prompt = tuple(encode_chat(
                self._template, self._tokenizer, read_messages(history), tools=conversation.prompt.tools,
                variables={"strftime_now": same_day},
            ))  # fmt: skip
            sampling = conversation.variant.sampling(self._job, self._end_ids)
            request = Request(request_id=str(next(self._ids)), prompt=prompt, sampling=sampling)
            self._scheduler.submit(request)
        except ContextLengthError as error:
            conversation.fault = f"is too long: {error}"
            return done(conversation)
        except RequestError as error:
            conversation.fault = f"does not fit the chat template: {error}"
            return done(conversation)
        conversation.messages = history
        text = _AnswerText(self._tokenizer, prompt, self._job.stop)
        self._turns[request.request_id] = _Turn(conversation, done, text)
        return None

    def advance(self) -> int:
        """Run one forward; returns the number of new tokens."""
        tokens = 0
        for step in self._scheduler.advance():
            tokens += len(step.token_ids)
            turn = self._turns.get(step.request_id)
            if turn is not None:
                self._add(turn, step)
        return tokens

    def _add(self, turn: _Turn, step: DecodeStep) -> None:
        text, ended = turn.text, step.finish_reason is not None
        for place, token in enumerate(step.token_ids):
            is_end = step.finish_reason == "stop" and place == len(step.token_ids) - 1
            text.push(token, shown=not is_end)
            if text.found is not None:
                break
        if text.found is None and not ended:
            return
        if not ended:
            self._scheduler.abort(step.request_id)
        del self._turns[step.request_id]
        cut = step.finish_reason == "length" and text.found is None
        text.end(cut=cut)
        stop_reason = text.found or (None if cut else self._named.get(step.token_ids[-1]))
        self._finish(turn, Answer(text.text, text.tokens, "length" if cut else "stop", stop_reason))

    def _finish(self, turn: _Turn, answer: Answer) -> None:
        conversation = turn.conversation
        cut = answer.finish_reason == "length"
        if cut and self._job.cut == "drop":
            conversation.fault = f"has an answer of more than max_tokens, {self._job.max_tokens}"
        else:
            conversation.messages.append(answer.message)
        conversation.answers.append(answer)
        if cut:
            turn.done(conversation)
        else:
            self.submit(conversation, turn.done)

    def _next_question(self, conversation: Conversation) -> list[dict[str, Any]] | None:
        """The conversation up to its next question; None if no question is left."""
        left = conversation.prompt.messages[len(conversation.messages) - len(conversation.answers) :]
        history = list(conversation.messages)
        for message, answered in questions(left):
            history.append(dict(message))
            if answered:
                return history
        conversation.messages = history
        return None


class _AnswerText:
    """The text of an answer so far, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: tuple[int, ...], stop: tuple[str, ...]) -> None:
        self.text, self.tokens = "", 0
        self._stream, self._stops = tokenizer.stream(after=prompt), StopStrings(stop)

    @property
    def found(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, token: int, *, shown: bool) -> None:
        """Add a token.

        shown  False for the token that ends the answer, which is no part of its text
        """
        self.tokens += 1
        if shown:
            self.text += self._stops.push(self._stream.push(token))

    def end(self, *, cut: bool) -> None:
        """Add the text that was held back. Of an answer that was cut off, half a character stays away."""
        if self.found is None and not cut:
            self.text += self._stops.push(self._stream.flush())
        if self.found is None:
            self.text += self._stops.flush()
