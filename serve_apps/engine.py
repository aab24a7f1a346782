"""What does it take to write texts with one set of weights?

A bundle, a decoder on one device, and a loop that batches all requests that reach it. Weights are never changed: other
weights are another engine.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from serve_apps.asked import Chat, PromptRequest
from serve_apps.batch_loop import BatchLoop
from serve_apps.lap import Lap, Stopwatch
from serve_apps.pieces import Piece, Tally
from serve_apps.prompting import PromptReader
from serve_apps.served import Served
from serve_apps.tokenizing import Tokenized, TokenizerInfo
from serve_apps.tool_forms import form_of
from serve_apps.tracing import note
from serve_apps.transcript import Transcript
from serve_apps.version_totals import VersionTotals
from tidar_core.artifacts import locations
from tidar_core.artifacts.bundle import DTYPES, load_bundle
from tidar_core.artifacts.chat_template import ChatTemplate, load_chat_template
from tidar_core.artifacts.latency_file import bundle_planner
from tidar_core.batcher import Batcher, complete
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoder import Decoder
from tidar_core.errors import BundleError, CapacityError, RequestError
from tidar_core.request import DecodeStep, Request

__all__ = ["Engine"]


class Engine:
    """One bundle at work."""

    def __init__(self, served: Served, totals: VersionTotals) -> None:
        """Loads the weights and runs them once. Raises BundleError or ConfigError.

        totals  where this engine's texts are counted
        """
        self.served, self.totals = served, totals
        self.texts = 0
        """Being written; whoever counts them knows when nobody needs this engine any more."""
        settings = served.settings
        bundle = load_bundle(served.bundle_uri, dtype=DTYPES[settings.dtype], device=settings.device)
        if bundle.info.bundle_hash != served.bundle_hash:
            raise BundleError(
                f"{served.bundle_uri} has hash {bundle.info.bundle_hash}; the service was started with "
                f"{served.bundle_hash}; restart it to serve the new bundle"
            )
        self._tokenizer = bundle.tokenizer
        draft = DraftConfig(block_len=served.block_len, kind=settings.draft_kind)
        decoder = Decoder(
            bundle.model, draft, rows=settings.rows, context_len=settings.context_len, pages=settings.pages
        )
        planner = bundle_planner(settings.mode, served.bundle_uri, decoder)
        self.batcher = Batcher(decoder, planner, max_waiting=settings.max_waiting)
        template = load_chat_template(served.bundle_uri, instead=settings.chat_template)
        self.tokenizer_info = _tokenizer_info(served.bundle_uri, template)
        self._prompts = PromptReader(
            bundle.tokenizer,
            template,
            vocab_size=bundle.model.config.vocab_size,
            context_len=decoder.context_len,
            tool_form=None if template is None else form_of(template, settings.tool_form),
        )
        _warm_up(self.batcher, self._tokenizer.eos_id)
        self.loop = BatchLoop(
            self.batcher,
            interval=settings.stream_interval_seconds,
            max_waiting_tokens=settings.max_waiting_tokens,
        )

    async def check_health(self) -> None:
        """Raise unless a forward succeeds; one of its own where no text is being written."""
        await self.loop.prove(self._tokenizer.eos_id, self.served.settings.hang_seconds)

    def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized:
        """The tokens of a prompt, as `pieces` reads it; with their names if they are wanted `spelled`."""
        tokens = self._prompts.tokens(prompt, framed=framed)
        return Tokenized(
            count=len(tokens),
            max_model_len=self.batcher.decoder.context_len,
            tokens=list(tokens),
            token_strs=[self._tokenizer.spell(token) for token in tokens] if spelled else None,
        )

    def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, special ones by their names."""
        return self._tokenizer.decode(tokens, skip_special=False)

    async def pieces(self, asked: PromptRequest) -> AsyncGenerator[Piece, None]:
        """Pieces of the completion that is asked for, an empty one first once it is admitted. Raises RequestError."""
        began, outcome, tally, lap = time.monotonic(), "aborted", Tally(), None
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

    def _note(self, asked: PromptRequest, outcome: str, tally: Tally, lap: Lap | None) -> None:
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

    async def _pieces(self, asked: PromptRequest, began: float) -> AsyncGenerator[Piece, None]:
        wanted = await asyncio.to_thread(self._prompts.request, asked)
        transcript = self._transcript(asked, wanted)
        form = None if asked.tools is None else self._prompts.tool_form
        watch = Stopwatch()
        async with aclosing(self.loop.steps(wanted, self._until(asked, wanted), watch)) as batches:
            admitted = begun = False
            async for steps in batches:
                if steps and not begun:
                    begun = True
                    self.totals.count_first(time.monotonic() - began)
                self.totals.forwards += len(steps)
                transcript.add(steps)
                if transcript.finish_reason == "stop" and transcript.stop_reason is None:
                    self._prompts.check_grammar(asked, wanted)
                if not admitted or transcript.finish_reason or (asked.pieces and transcript.pending):
                    piece = transcript.take()
                    if transcript.finish_reason is not None:
                        piece = piece._replace(lap=watch.lap)
                    yield piece if admitted else piece._replace(tool_form=form, fingerprint=self.served.fingerprint)
                    admitted = True

    def _until(self, asked: PromptRequest, wanted: Request) -> Callable[[DecodeStep], bool] | None:
        """Says in the decoder's thread which step completes a stop string, so that the row is free before the next."""
        if not asked.stop:
            return None
        twin = self._transcript(replace(asked, echo=False, logprobs=None, prompt_logprobs=None), wanted)
        return lambda step: twin.add([step]).finish_reason is not None

    def _transcript(self, asked: PromptRequest, wanted: Request) -> Transcript:
        return Transcript(self._tokenizer, asked, wanted.prompt, block_len=self.served.block_len)


def _tokenizer_info(bundle_uri: str, template: ChatTemplate | None) -> TokenizerInfo:
    config = locations.read_json(locations.join(bundle_uri, "tokenizer_config.json"))
    sources = None if template is None else template.sources
    shown = sources["default"] if sources is not None and len(sources) == 1 else sources
    return TokenizerInfo.model_validate(config | {"chat_template": shown})


def _warm_up(batcher: Batcher, token_id: int) -> None:
    """One prefill and one decode step, so that the first client does not pay for what is compiled or allocated late."""
    sampling = SamplingConfig(max_tokens=2)
    complete(batcher, [Request(request_id="warm-up", prompt=(token_id,), sampling=sampling)])
