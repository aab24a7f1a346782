"""The messages of one text on its way from the decoder to the ingress.

A delta has the new text and the cost of the text so far. The messages are tuples, which Python pickles in C, because
the decoder and the event loops pay for every delta.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import ChatTokenLogprob, Logprobs, PlainScores, PromptScores

__all__ = ["FinishReason", "GenerationFailed", "TextDelta", "UsageCounts"]

FinishReason = Literal["stop", "length"]
"""Reason why a text ended."""


class UsageCounts(NamedTuple):
    """Cost of one or several texts so far, and the fate of their drafts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    histogram: tuple[int, ...] = ()
    """At index j, the number of decode steps that accepted j speculative tokens; K entries."""
    cached_tokens: int = 0
    """Prompt tokens that were in the cache already."""

    def __add__(self, other: "UsageCounts") -> "UsageCounts":  # pyrefly: ignore[bad-override]
        return UsageCounts(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            tuple(a + b for a, b in zip_longest(self.histogram, other.histogram, fillvalue=0)),
            self.cached_tokens + other.cached_tokens,
        )

    @property
    def drafts_per_step(self) -> int:
        """Speculative tokens of a draft block: K - 1; 0 in the autoregressive mode."""
        return max(0, len(self.histogram) - 1)

    @property
    def decode_steps(self) -> int:
        """Number of decode steps."""
        return sum(self.histogram)

    @property
    def drafted_tokens(self) -> int:
        """Speculative tokens of all decode steps."""
        return self.decode_steps * self.drafts_per_step

    @property
    def accepted_tokens(self) -> int:
        """Speculative tokens that were accepted."""
        return sum(j * count for j, count in enumerate(self.histogram))


class TextDelta(NamedTuple):
    """New text since the last delta. The first delta means that the request was admitted, and may have no text."""

    text: str
    finish_reason: FinishReason | None
    """Set in the last delta."""
    usage: UsageCounts
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the text."""
    logprobs: Logprobs | list[ChatTokenLogprob] | None = None
    """Logprobs of the tokens whose text has been sent by now, if requested."""
    prompt_logprobs: PromptScores | None = None
    """Logprobs of the prompt, with the first text, if requested. `TextGenerator` makes them of `prompt_scores`."""
    token_ids: tuple[int, ...] | None = None
    """New tokens, if requested."""
    prompt_token_ids: tuple[int, ...] | None = None
    """Tokens of the prompt, in the first delta, if requested."""
    decoding: Decoding | None = None
    """Origins of new tokens, if requested."""
    tool_form: str | None = None
    """Form of calls (`tool_call_formats.FORMS`), in the first delta, if functions may be called."""
    timing: RequestTiming | None = None
    """Durations of the request, in the last delta."""
    fingerprint: str = ""
    """Identifies the weights and the way of decoding; in the first delta."""
    forwards: int = 0
    """Forwards so far that gave the text tokens."""
    attempt: int = 0
    """Number of replicas that died before this replica began the text."""
    prompt_scores: PlainScores | None = None
    """Logprobs of the prompt as the engine sends them; no delta has them in both forms."""


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """The end of a text that failed."""

    error: Exception
