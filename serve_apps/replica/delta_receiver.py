"""The way from the decode steps of one request to its text deltas.

Which steps does a client see as text? Tokens become text here, once, in the decoder's thread. So a stop string frees
the slot before the next forward, and steps that are delivered together cost one message.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.request_timing import TimingRecorder
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.streaming.detokenizer import IncrementalDetokenizer, Tokenizer
from serve_apps.streaming.tool_call_formats import FORMS
from tidar_core.decoding.request import DecodeStep

__all__ = ["DeltaReceiver"]


class DeltaReceiver:
    """Receiver of one request's decode steps (`decode_loop.StepReceiver`)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        send: Callable[[TextDelta | GenerationFailed], None],
        *,
        block_len: int,
        fingerprint: str,
        tool_form: str | None,
        timing: TimingRecorder,
        check_end: Callable[[], None] = lambda: None,
    ) -> None:
        """prompt       tokens of the request's prompt
        send         called with each delta, in the decoder's thread; the last one has a finish_reason or is an error
        fingerprint  identifies the weights and the way of decoding; goes with the first delta
        tool_form    form in which the model writes calls of functions
        check_end    called once the decoder has stopped the text; may raise what the text ends with instead
        """
        form = None if request.tools is None else tool_form
        if form is not None and FORMS[form].opening:
            request = replace(request, skip_special=False)  # what a call begins and ends with may be special tokens
        self._text = IncrementalDetokenizer(tokenizer, request, prompt, block_len=block_len)
        self._streamed, self._timing, self._send, self._check_end = request.pieces, timing, send, check_end
        self._first: dict[str, Any] = {"tool_form": form, "fingerprint": fingerprint}
        self._forwards = 0
        self._error: Exception | None = None

    def take(self, step: DecodeStep) -> bool:
        """Add the text of a step. Returns True if the text ends with it. An error ends this request alone."""
        self._forwards += 1
        try:
            if step.finish_reason == "stop":
                self._check_end()
            self._text.add([step])
        except Exception as error:
            self._error = error
        return self._error is not None or self._text.finish_reason is not None

    def deliver(self, *, last: bool) -> None:
        """Send all text since the last delta. A text that is not streamed is sent at its admission and at its end.

        An error ends this request alone: with its next step, if this is not the last.
        """
        if self._error is None and (last or self._first or (self._streamed and self._text.pending)):
            try:
                delta = self._delta(last=last)
            except Exception as error:
                self._error = error
            else:
                self._send(delta)
                return
        if self._error is not None and last:
            self.fail(self._error)

    def fail(self, error: Exception) -> None:
        """End the text with an error."""
        self._send(GenerationFailed(error))

    def _delta(self, *, last: bool) -> TextDelta:
        timing = self._timing.timing if last else None
        delta = self._text.take()._replace(forwards=self._forwards, timing=timing, **self._first)
        self._first = {}
        return delta
