"""An engine together with the record of what its version generated."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.messages.version_stats import VersionStats
from serve_apps.replica.engine_client import EngineClient
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.streaming.logprobs import score_models
from serve_apps.telemetry.tracing import note
from tidar_core.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from serve_apps.replica.engine import Engine

__all__ = ["TextGenerator"]


class TextGenerator:
    """An engine whose texts are counted for its version, in the replica's process."""

    def __init__(self, served: ModelVersion, engine: "Engine | EngineClient", totals: VersionStats) -> None:
        """totals  where this engine's texts are counted"""
        self.served, self.engine, self.totals = served, engine, totals
        self.texts = 0
        """Texts in flight. The pool counts them, and ends an engine without a role once there are none."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Deltas of a text, the first once it is admitted, possibly without text. Raises RequestError."""
        began, outcome, last = time.monotonic(), "aborted", TextDelta("", None, UsageCounts())
        try:
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    self._count_forwards(delta, last, time.monotonic() - began)
                    last = delta
                    outcome = "aborted" if delta.finish_reason is None else "texts"
                    yield _with_models(delta)
        except (RequestError, CapacityError):
            outcome = "refused"
            raise
        except Exception:
            outcome = "errors"
            raise
        finally:
            self.totals.count(outcome, last.usage, time.monotonic() - began)
            self.totals.plain_tokens += 0 if request.speculative else last.usage.completion_tokens
            self._note(request, outcome, last)

    def _count_forwards(self, delta: TextDelta, before: TextDelta, seconds: float) -> None:
        """Count the forwards of a delta that came `seconds` after its request."""
        if delta.forwards and not before.forwards:
            decode_seconds = 0.0 if delta.timing is None else delta.timing.decode  # all tokens came at once
            self.totals.count_first(seconds - decode_seconds)
        self.totals.forwards += delta.forwards - before.forwards

    def _note(self, request: GenerationRequest, outcome: str, last: TextDelta) -> None:
        """Write what is known of a text into its span."""
        note(
            gen_ai__response__model=self.served.settings.shown_name,
            gen_ai__usage__input_tokens=last.usage.prompt_tokens,
            gen_ai__usage__output_tokens=last.usage.completion_tokens,
            tidar__mode=self.served.mode if request.speculative else "autoregressive",
            tidar__fingerprint=self.served.fingerprint,
            tidar__outcome=outcome,
            tidar__queue_seconds=None if last.timing is None else last.timing.queue,
            tidar__prefill_seconds=None if last.timing is None else last.timing.prefill,
            tidar__decode_seconds=None if last.timing is None else last.timing.decode,
        )


def _with_models(delta: TextDelta) -> TextDelta:
    """The delta with the scores of its prompt as models. Building them holds up this process, and not the decoder."""
    if delta.prompt_scores is None:
        return delta
    return delta._replace(prompt_logprobs=score_models(delta.prompt_scores), prompt_scores=None)
