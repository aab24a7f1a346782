"""The way from text deltas to a response of /v1/chat/completions: server-sent events, or one body.

Streamed and whole messages come from the same deltas and the same parser of calls, so a stream joins to the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from serve_apps.api.chat_response import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from serve_apps.messages.generation_request import ToolUse
from serve_apps.messages.text_delta import TextDelta
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import ChatTokenLogprob, PromptScores
from serve_apps.streaming.completion_stream import Reply
from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.streaming.tool_call_parser import CallDelta, ParsedText, ToolCallParser

__all__ = ["ChatReply"]


@dataclass(slots=True, kw_only=True)
class ChatReply(Reply):
    """A response of /v1/chat/completions."""

    tools: ToolUse | None = None
    """Functions that may be called."""
    parsers: dict[int, ToolCallParser | None] = field(default_factory=dict)
    """Parser of each choice that has begun; None where no calls are expected."""
    named: set[int] = field(default_factory=set)
    """Choices with an event that has their role."""

    def _chunks(self, index: int, delta: TextDelta) -> Iterator[dict[str, Any]]:
        parsed = self._parse(index, delta)
        if index not in self.named:
            self.named.add(index)
            first = self._delta(index, {"role": "assistant", "content": ""})
            if delta.prompt_token_ids is not None:
                first["prompt_token_ids"] = list(delta.prompt_token_ids)
            yield first
        deltas: list[dict[str, Any]] = [{"content": parsed.content}] if parsed.content else []
        deltas += [{"tool_calls": [_call_delta(call).model_dump(exclude_none=True)]} for call in parsed.calls]
        logprobs = _logprobs([delta])
        if not (deltas or delta.finish_reason or delta.token_ids or logprobs or delta.decoding):
            return
        self.sent.add(index)
        *before, last = deltas or [{}]
        for part in before:
            yield self._delta(index, part)
        chunk = self._delta(index, last)
        (choice,) = chunk["choices"]
        choice |= {
            "logprobs": to_jsonable_python(logprobs),
            "token_ids": _ids([delta]),
            "decoding": to_jsonable_python(delta.decoding),
        }
        if delta.finish_reason is not None:
            choice |= {"finish_reason": self._reason(index, delta), "stop_reason": delta.stop_reason}
        yield chunk

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        """JSON of a `ChatChunk`, with the fields of `delta` that are there."""
        choice = {
            "index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None,
            "token_ids": None, "decoding": None,
        }  # fmt: skip
        return {**self._chunk("chat.completion.chunk", choice), "prompt_token_ids": None}

    def _last_chunk(self) -> ChatChunk:
        return ChatChunk(**self._heading(), **self._cost(), choices=[])

    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        whole = [self._choice(index, deltas) for index, deltas in enumerate(choices)]
        first = choices[0]
        scores: PromptScores | None = next((delta.prompt_logprobs for delta in first if delta.prompt_logprobs), None)
        ids = next((list(delta.prompt_token_ids) for delta in first if delta.prompt_token_ids is not None), None)
        body = ChatCompletion(
            **self._heading(), **self._cost(), choices=whole, prompt_logprobs=scores, prompt_token_ids=ids
        ).model_dump(mode="json")
        for choice in body["choices"]:
            if choice["message"]["tool_calls"] is None:
                del choice["message"]["tool_calls"]
        return body

    def _choice(self, index: int, deltas: Sequence[TextDelta]) -> ChatChoice:
        parsed = [self._parse(index, delta) for delta in deltas]
        calls: list[ToolCall] = []
        for call in (call for each in parsed for call in each.calls):
            if call.name is not None:
                calls.append(ToolCall(id=str(call.call_id), function=CalledFunction(name=call.name, arguments="")))
            calls[call.index].function.arguments += call.arguments
        content = "".join(each.content for each in parsed)
        return ChatChoice(
            index=index,
            message=ChatMessage(content=content if content or not calls else None, tool_calls=calls or None),
            logprobs=_logprobs(deltas),
            finish_reason=self._reason(index, deltas[-1]),
            stop_reason=deltas[-1].stop_reason,
            token_ids=_ids(deltas),
            decoding=Decoding.joined([delta.decoding for delta in deltas if delta.decoding is not None]),
        )

    def _reset(self, index: int) -> None:
        Reply._reset(self, index)
        self.parsers.pop(index, None)

    def _parse(self, index: int, delta: TextDelta) -> ParsedText:
        """Content and calls that a delta has made certain."""
        if index not in self.parsers:
            form = None if self.tools is None or delta.tool_form is None else FORMS[delta.tool_form]
            self.parsers[index] = None
            if self.tools is not None and form is not None:
                self.parsers[index] = ToolCallParser(form, self.tools.names, parallel=self.tools.parallel)
        parser = self.parsers[index]
        if parser is None:
            return ParsedText(delta.text)
        parsed = parser.push(delta.text)
        if delta.finish_reason is not None:
            rest = parser.end()
            parsed = ParsedText(parsed.content + rest.content, parsed.calls + rest.calls)
        return parsed

    def _reason(self, index: int, last: TextDelta) -> ChatFinishReason:
        assert last.finish_reason is not None, "a text ended without a reason"
        parser = self.parsers[index]
        return (
            "tool_calls" if parser is not None and parser.count and last.finish_reason == "stop" else last.finish_reason
        )


def _call_delta(call: CallDelta) -> ToolCallDelta:
    return ToolCallDelta(
        index=call.index,
        id=call.call_id,
        type=None if call.call_id is None else "function",
        function=FunctionDelta(name=call.name, arguments=call.arguments),
    )


def _logprobs(deltas: Sequence[TextDelta]) -> ChatLogprobs | None:
    scored = [delta.logprobs for delta in deltas if isinstance(delta.logprobs, list)]
    content: list[ChatTokenLogprob] = [token for each in scored for token in each]
    return ChatLogprobs(content=content) if scored and (content or len(deltas) > 1) else None


def _ids(deltas: Sequence[TextDelta]) -> list[int] | None:
    scored = [delta.token_ids for delta in deltas if delta.token_ids is not None]
    return [token for each in scored for token in each] if scored else None
