"""How do an engine's decode steps become pieces of text?

In the replica's process, whichever the engine is in: tokens become text here, and each text is counted for its version.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.messages.version_stats import VersionStats
from serve_apps.replica.engine import Engine
from serve_apps.replica.engine_client import EngineClient
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.telemetry.tracing import note
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.errors import CapacityError, RequestError

__all__ = ["TextGenerator"]


class TextGenerator:
    """An engine, and what it has written."""

    def __init__(
        self, served: ModelVersion, engine: Engine | EngineClient, tokenizer: Tokenizer, totals: VersionStats
    ) -> None:
        """totals  where this engine's texts are counted"""
        self.served, self.engine, self.totals = served, engine, totals
        self.texts = 0
        """Being written; whoever counts them knows when nobody needs this engine any more."""
        self._tokenizer = tokenizer

    async def pieces(self, asked: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Pieces of the completion that is asked for, the first once it is admitted, if need be without text. Raises
        RequestError."""
        began, outcome, tally, lap = time.monotonic(), "aborted", UsageCounts(), None
        try:
            async with aclosing(self._pieces(asked, began)) as pieces:
                async for piece in pieces:
                    tally, lap = piece.tally, piece.lap
                    outcome = "aborted" if piece.finish_reason is None else "texts"
                    yield piece
        except (RequestError, CapacityError):
            outcome = "refused"
            raise
        except Exception:
            outcome = "errors"
            raise
        finally:
            self.totals.count(outcome, tally, time.monotonic() - began)
            self.totals.plain_tokens += 0 if asked.speculative else tally.completion_tokens
            self._note(asked, outcome, tally, lap)

    def _note(self, asked: GenerationRequest, outcome: str, tally: UsageCounts, lap: RequestTiming | None) -> None:
        """What the span of a text says of it."""
        note(
            gen_ai__response__model=self.served.settings.shown_name,
            gen_ai__usage__input_tokens=tally.prompt_tokens,
            gen_ai__usage__output_tokens=tally.completion_tokens,
            tidar__mode=self.served.settings.mode if asked.speculative else "autoregressive",
            tidar__fingerprint=self.served.fingerprint,
            tidar__outcome=outcome,
            tidar__queue_seconds=None if lap is None else lap.queue,
            tidar__prefill_seconds=None if lap is None else lap.prefill,
            tidar__decode_seconds=None if lap is None else lap.decode,
        )

    async def _pieces(self, asked: GenerationRequest, began: float) -> AsyncGenerator[TextDelta, None]:
        form = None if asked.tools is None else self.engine.tool_form
        if form is not None and FORMS[form].opening:
            asked = replace(asked, skip_special=False)  # what a call begins and ends with may be special tokens
        heading: dict[str, Any] = {"tool_form": form, "fingerprint": self.served.fingerprint}
        begun = False
        async with aclosing(self.engine.steps(asked)) as batches:
            async for batch in batches:
                if batch.prompt:
                    transcript = IncrementalDetokenizer(
                        self._tokenizer, asked, batch.prompt, block_len=self.served.block_len
                    )
                if batch.steps and not begun:
                    begun = True
                    self.totals.count_first(time.monotonic() - began)
                self.totals.forwards += len(batch.steps)
                transcript.add(batch.steps)
                if transcript.finish_reason is not None:
                    yield transcript.take()._replace(lap=batch.lap, **heading)
                    return  # and waits for no word from elsewhere: who has the last piece may hang up at once
                if heading or (asked.pieces and transcript.pending):
                    yield transcript.take()._replace(**heading)
                    heading = {}
