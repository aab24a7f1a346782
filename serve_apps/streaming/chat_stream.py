"""How do the pieces of texts become messages, in a stream or whole?

Streamed and whole messages come from the same pieces by the same reader of calls, so the one joins to the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_apps.api.chat_response import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Delta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from serve_apps.api.completion_response import PromptScores
from serve_apps.messages.generation_request import ToolUse
from serve_apps.messages.text_delta import TextDelta
from serve_apps.streaming.completion_stream import Reply
from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.streaming.tool_call_parser import CallPiece, Said, ToolCallReader

__all__ = ["ChatReply"]


@dataclass(slots=True, kw_only=True)
class ChatReply(Reply):
    """A response of /v1/chat/completions."""

    tools: ToolUse | None = None
    """The functions that may be called."""
    readers: dict[int, ToolCallReader | None] = field(default_factory=dict)
    """Of the choices that have begun; None where no calls are looked for."""
    named: set[int] = field(default_factory=set)
    """Choices whose role has been told."""

    def _chunks(self, index: int, piece: TextDelta) -> Iterator[dict[str, Any]]:
        said = self._read(index, piece)
        if index not in self.named:
            self.named.add(index)
            first = self._chunk(ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")))
            if piece.prompt_token_ids is not None:
                first["prompt_token_ids"] = list(piece.prompt_token_ids)
            yield first
        deltas = [Delta(content=said.content)] if said.content else []
        deltas += [Delta(tool_calls=[_call_delta(call)]) for call in said.calls]
        logprobs = _logprobs([piece])
        if not deltas and piece.finish_reason is None and not piece.token_ids and not logprobs:
            return
        self.told.add(index)
        *before, last = deltas or [Delta()]
        for delta in before:
            yield self._chunk(ChatChunkChoice(index=index, delta=delta))
        choice = ChatChunkChoice(index=index, delta=last, logprobs=logprobs, token_ids=_ids([piece]))
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = self._reason(index, piece), piece.stop_reason
        yield self._chunk(choice)

    def _chunk(self, choice: ChatChunkChoice) -> dict[str, Any]:
        chunk = ChatChunk(**self._heading(choice.index), choices=[choice]).model_dump(mode="json")
        chunk["choices"][0]["delta"] = choice.delta.model_dump(mode="json", exclude_none=True)
        return chunk

    def _last_chunk(self) -> ChatChunk:
        return ChatChunk(**self._heading(), **self._cost(), choices=[])

    def _whole(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        told = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        first = choices[0]
        scores: PromptScores | None = next((piece.prompt_logprobs for piece in first if piece.prompt_logprobs), None)
        ids = next((list(piece.prompt_token_ids) for piece in first if piece.prompt_token_ids is not None), None)
        body = ChatCompletion(
            **self._heading(), **self._cost(), choices=told, prompt_logprobs=scores, prompt_token_ids=ids
        ).model_dump(mode="json")
        for choice in body["choices"]:
            if choice["message"]["tool_calls"] is None:
                del choice["message"]["tool_calls"]
        return body

    def _choice(self, index: int, pieces: Sequence[TextDelta]) -> ChatChoice:
        said = [self._read(index, piece) for piece in pieces]
        calls: list[ToolCall] = []
        for call in (call for each in said for call in each.calls):
            if call.name is not None:
                calls.append(ToolCall(id=str(call.call_id), function=CalledFunction(name=call.name, arguments="")))
            calls[call.index].function.arguments += call.arguments
        content = "".join(each.content for each in said)
        return ChatChoice(
            index=index,
            message=ChatMessage(content=content if content or not calls else None, tool_calls=calls or None),
            logprobs=_logprobs(pieces),
            finish_reason=self._reason(index, pieces[-1]),
            stop_reason=pieces[-1].stop_reason,
            token_ids=_ids(pieces),
        )

    def _forget(self, index: int) -> None:
        Reply._forget(self, index)
        self.readers.pop(index, None)

    def _read(self, index: int, piece: TextDelta) -> Said:
        """What a piece says, once it is certain."""
        if index not in self.readers:
            form = None if self.tools is None or piece.tool_form is None else FORMS[piece.tool_form]
            self.readers[index] = None
            if self.tools is not None and form is not None:
                self.readers[index] = ToolCallReader(form, self.tools.names, parallel=self.tools.parallel)
        reader = self.readers[index]
        if reader is None:
            return Said(piece.text)
        said = reader.push(piece.text)
        if piece.finish_reason is not None:
            held = reader.end()
            said = Said(said.content + held.content, said.calls + held.calls)
        return said

    def _reason(self, index: int, last: TextDelta) -> ChatFinishReason:
        assert last.finish_reason is not None, "a text ended without a reason"
        reader = self.readers[index]
        return (
            "tool_calls" if reader is not None and reader.count and last.finish_reason == "stop" else last.finish_reason
        )


def _call_delta(call: CallPiece) -> ToolCallDelta:
    return ToolCallDelta(
        index=call.index,
        id=call.call_id,
        type=None if call.call_id is None else "function",
        function=FunctionDelta(name=call.name, arguments=call.arguments),
    )


def _logprobs(pieces: Sequence[TextDelta]) -> ChatLogprobs | None:
    told = [piece.logprobs for piece in pieces if isinstance(piece.logprobs, list)]
    content: list[ChatTokenLogprob] = [token for each in told for token in each]
    return ChatLogprobs(content=content) if told and (content or len(pieces) > 1) else None


def _ids(pieces: Sequence[TextDelta]) -> list[int] | None:
    told = [piece.token_ids for piece in pieces if piece.token_ids is not None]
    return [token for each in told for token in each] if told else None
