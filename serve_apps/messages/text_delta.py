"""The messages of one text on its way from the decoder to the ingress.

A delta has the new text and the cost of the text so far. The messages are tuples, which Python pickles in C, because
the decoder and the event loops pay for every delta.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from serve_apps.api.chat_response import ChatTokenLogprob
from serve_apps.api.completion_response import (
    FinishReason,
    Logprobs,
    Metrics,
    PromptScores,
    PromptTokensDetails,
    SpeculativeDecoding,
    Usage,
)
from serve_apps.api.token_origins import Decoding
from serve_apps.messages.request_timing import RequestTiming

__all__ = ["GenerationFailed", "PlainScores", "TextDelta", "UsageCounts"]

PlainScores = list[dict[int, tuple[float, int | None, str]] | None]
"""`PromptScores` before they are models: log probability, rank and text of tokens, by id. A prompt can have 10**5 of
them, and models take 20 times as long to build and to send as tuples do."""


class UsageCounts(NamedTuple):
    """Cost of one or several texts so far, and the fate of their drafts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    histogram: tuple[int, ...] = ()
    """At index j, the number of decode steps that accepted j speculative tokens; K entries."""
    cached_tokens: int = 0
    """Prompt tokens that were in the cache already."""

    def __add__(self, other: "UsageCounts") -> "UsageCounts":  # type: ignore[override]
        return UsageCounts(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            tuple(a + b for a, b in zip_longest(self.histogram, other.histogram, fillvalue=0)),
            self.cached_tokens + other.cached_tokens,
        )

    def for_response(self) -> Usage:
        """Tokens of prompts and texts, for a response."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
        )

    def metrics(self) -> Metrics | None:
        """Statistics of the drafts; None in the autoregressive mode, which has no drafts."""
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
