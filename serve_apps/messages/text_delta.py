"""What does a decoder replica tell the ingress of one text?

Pieces, each with the new text and with all that it has cost so far; or that it has failed. They are tuples, which are
pickled in C, since the decoder waits for whatever its event loop does.
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

__all__ = ["GenerationFailed", "TextDelta", "UsageCounts"]


class UsageCounts(NamedTuple):
    """What prompts have cost so far, and how their drafts fared."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    histogram: tuple[int, ...] = ()
    """At index j, the decode steps in which j speculative tokens stood; K entries."""
    cached_tokens: int = 0
    """Of the prompts' tokens, those that were in the cache already."""

    def __add__(self, other: "UsageCounts") -> "UsageCounts":  # type: ignore[override]
        return UsageCounts(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            tuple(a + b for a, b in zip_longest(self.histogram, other.histogram, fillvalue=0)),
            self.cached_tokens + other.cached_tokens,
        )

    def usage(self) -> Usage:
        """Tokens read and written."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
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


class TextDelta(NamedTuple):
    """What has come of one text since its last piece; the first says that it was admitted and may have no text."""

    text: str
    finish_reason: FinishReason | None
    """Set on the last piece."""
    tally: UsageCounts
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the text."""
    logprobs: Logprobs | list[ChatTokenLogprob] | None = None
    """Of the tokens whose text has been told by now, where asked for."""
    prompt_logprobs: PromptScores | None = None
    """With the first text, where asked for."""
    token_ids: tuple[int, ...] | None = None
    """New tokens, where asked for."""
    prompt_token_ids: tuple[int, ...] | None = None
    """With the first piece, where asked for."""
    decoding: Decoding | None = None
    """Of new tokens, where asked for."""
    tool_form: str | None = None
    """With the first piece, where functions may be called: how calls are written (`tool_forms.FORMS`)."""
    lap: RequestTiming | None = None
    """With the last piece."""
    fingerprint: str = ""
    """With the first piece: of the weights that write the text, and of how they are decoded."""
    attempt: int = 0
    """Replicas that had died before this one wrote the text."""


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """The end of a text that cannot be completed."""

    error: Exception
