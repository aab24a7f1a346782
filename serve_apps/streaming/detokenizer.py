"""The incremental detokenizer: the way from the decode steps of one request to its text.

Only final tokens become text, and a character only when all its bytes have come. The text ends at the first stop
string, however the tokens are divided into steps. Tokens after the token that completes the stop string do not count.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, Self

from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.text_delta import FinishReason, TextDelta, UsageCounts
from serve_apps.messages.token_origins import Decoding, Origin
from serve_apps.messages.token_scores import PlainScores
from serve_apps.streaming.logprobs import ChatScoreSheet, ScoreSheet, prompt_scores
from serve_apps.streaming.token_origins import origins
from tidar_core.decoding.stop_strings import StopStrings, stop_tokens

if TYPE_CHECKING:
    from tidar_core.decoding.request import DecodeStep, TokenLogprob

__all__ = ["IncrementalDetokenizer"]


class TextStream(Protocol):
    """The interface of `tidar_core.artifacts.text.detokenizer.TextStream`."""

    def push(self, token_id: int) -> str:
        """Text that is certain now."""

    def flush(self) -> str:
        """Text that was held back."""


class Tokenizer(Protocol):
    """The part of `tidar_core.artifacts.text.tokenizer.Tokenizer` that a detokenizer uses."""

    eos_id: int

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens by their names."""

    def stream(self, *, skip_special: bool = True, after: Sequence[int] = ()) -> TextStream:
        """A decoder for ids that come one after another, behind the text of the ids `after`."""

    def offsets(self, text: str, *, framed: bool = False) -> list[int]:
        """Offset of each token of `text`, in characters."""

    def spell(self, token_id: int) -> str:
        """Name of a token."""

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text."""


class IncrementalDetokenizer:
    """The text of one request, which grows with its tokens."""

    def __init__(
        self, tokenizer: Tokenizer, request: GenerationRequest, prompt: Sequence[int], *, block_len: int
    ) -> None:
        """prompt  the tokens of the request's prompt"""
        self._tokenizer, self._request, self._prompt = tokenizer, request, prompt
        self._echoes_ids = request.echo and not isinstance(request.prompt, str)
        before = () if self._echoes_ids else prompt  # an echo of ids and what follows are one text
        self._stream = tokenizer.stream(skip_special=request.skip_special, after=before)
        self._stop_tokens = stop_tokens(request.stop, tokenizer.special_ids)
        self._stops = StopStrings(request.stop, include=request.include_stop)
        self._sheet: ScoreSheet | None = None
        if request.logprobs is not None and isinstance(request.prompt, Chat):
            self._sheet = ChatScoreSheet(tokenizer.spell, request.logprobs, tokenizer.bytes_of)
        elif request.logprobs is not None:
            self._sheet = ScoreSheet(tokenizer.spell, request.logprobs)
        self._new_ids: list[int] = []
        self._forwards = 0
        self._decoding = Decoding()
        self._prompt_sent = False
        self._completion_tokens = self._cached_tokens = 0
        self._histogram = [0] * block_len
        self._begun = False
        self._text = ""
        self._text_len = self._sent_len = 0
        """Characters of the text so far, a stop string that is cut off included; and characters taken."""
        self._prompt_scores: PlainScores | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def add(self, steps: "Iterable[DecodeStep]") -> Self:
        """Add steps. A stop token counts as a token, but its text is left out unless `include_stop` is set."""
        for step in steps:
            if self.finish_reason is None:
                self._add_step(step)
        return self

    @property
    def pending(self) -> bool:
        """There is text to send, or the text has ended."""
        return bool(self._text) or self.finish_reason is not None

    def take(self) -> TextDelta:
        """The delta of everything since the last call."""
        usage = UsageCounts(len(self._prompt), self._completion_tokens, tuple(self._histogram), self._cached_tokens)
        prompt_ids = tuple(self._prompt) if self._request.token_ids and not self._prompt_sent else None
        self._prompt_sent = True
        if not self.pending:
            return TextDelta("", None, usage, prompt_token_ids=prompt_ids)
        text, self._text = self._text, ""
        scores, self._prompt_scores = self._prompt_scores, None
        self._sent_len += len(text)
        logprobs = None
        if self._sheet is not None:
            logprobs = self._sheet.take(self._sent_len if self.finish_reason is None else None)
        new_ids, self._new_ids = tuple(self._new_ids) if self._request.token_ids else None, []
        decoding = None
        if self._request.decoding:
            decoding, self._decoding = self._decoding, Decoding()
        delta = TextDelta(
            text, self.finish_reason, usage, self.stop_reason, logprobs, None, new_ids, prompt_ids, decoding
        )
        return delta if scores is None else delta._replace(prompt_scores=scores)

    def _add_step(self, step: "DecodeStep") -> None:
        self._cached_tokens += step.cached
        if not self._begun:
            self._begin(step.prompt_logprobs)
        if self._request.prompt_alone:
            self._text += self._stream.flush() if self._echoes_ids else ""
            self.finish_reason = "length"
            return
        if step.verified > 1:
            self._histogram[step.accepted - 1] += 1
        ending = step.finish_reason == "stop"
        self._forwards += 1
        token_origins = origins(step) if self._request.decoding else []
        for place, token in enumerate(step.token_ids):
            last = ending and place == len(step.token_ids) - 1
            if token_origins:
                self._add_origin(token_origins[place])
            self._add_token(token, step.logprobs[place] if step.logprobs else None, ending=last)
            if self._stops.found is not None:
                return
        if step.finish_reason is not None:
            self._end(step)

    def _begin(self, scored: "Sequence[TokenLogprob]") -> None:
        """Add the prompt to the text and to the scores, if requested."""
        self._begun = True
        if self._request.prompt_logprobs is not None:
            self._prompt_scores = prompt_scores(scored, self._request.prompt_logprobs, self._tokenizer.spell)
        if not self._request.echo:
            return
        begins = self._echo()
        if self._sheet is not None:
            for place, token in enumerate(self._prompt):
                self._sheet.add(token, scored[place - 1] if place else None, begins[place], begins[place + 1])
        self._text_len = len(self._text)

    def _echo(self) -> list[int]:
        """Begin the text with the prompt. Returns the offset of each of its tokens, and the end of the last.

        A prompt of text keeps its own spelling, which the text of its tokens may change.
        """
        written = self._request.prompt
        stream = self._stream if self._echoes_ids else self._tokenizer.stream(skip_special=self._request.skip_special)
        texts = [stream.push(token) for token in self._prompt]
        self._text = "".join(texts)
        if isinstance(written, str) and self._text != written:
            self._text = written
            return [*self._tokenizer.offsets(written, framed=self._request.framed), len(written)]
        return list(accumulate(map(len, texts), initial=0))

    def _add_origin(self, origin: Origin) -> None:
        """Note the origin of the next token."""
        self._decoding.forward.append(self._forwards - 1)
        self._decoding.origin.append(origin)
        self._decoding.text_offset.append(self._text_len)

    def _add_token(self, token: int, scored: "TokenLogprob | None", *, ending: bool) -> None:
        self._completion_tokens += 1
        self._new_ids.append(token)
        if ending and token in self._stop_tokens:  # the name of the token is a stop string
            text = self._stream.flush() + self._stop_tokens[token]
        elif ending and not self._request.include_stop:
            text = ""
        else:
            text = self._stream.push(token)
        if self._sheet is not None:
            self._sheet.add(token, scored, self._text_len, self._text_len + len(text))
        self._hold_to_stops(text)

    def _hold_to_stops(self, text: str) -> None:
        """Add text up to the possible begin of a stop string. As in vLLM, no stop string ends within min_tokens."""
        self._text_len += len(text)
        self._text += self._stops.push(text, looked_for=self._completion_tokens > self._request.sampling.min_tokens)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found

    def _end(self, step: "DecodeStep") -> None:
        """Add the text that was held back, unless it completes a stop string: the decoder has ended the text."""
        self._hold_to_stops(self._stream.flush())
        if self._stops.found is not None:
            return
        self._text += self._stops.flush()
        self.finish_reason = "stop" if step.finish_reason == "stop" else "length"
        end_of_text = None if self._request.ignore_eos else self._tokenizer.eos_id
        if step.finish_reason == "stop" and step.token_ids[-1] != end_of_text:
            self.stop_reason = step.token_ids[-1]
