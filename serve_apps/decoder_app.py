"""What owns a model and its share of a machine?

A Ray Serve replica: a bundle, a decoder on one device, and a loop that batches all requests that reach it.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import torch

from serve_apps.asked import Chat, PromptRequest
from serve_apps.batch_loop import BatchLoop
from serve_apps.pieces import Failed, Piece
from serve_apps.prompting import PromptReader
from serve_apps.replica_load import Load, load_of
from serve_apps.settings import ServeSettings
from serve_apps.tokenizing import Tokenized, TokenizerInfo
from serve_apps.tool_forms import form_of
from serve_apps.transcript import Transcript
from tidar_core.artifacts import locations
from tidar_core.artifacts.bundle import DTYPES, load_bundle
from tidar_core.artifacts.chat_template import ChatTemplate, load_chat_template
from tidar_core.artifacts.latency_file import bundle_planner
from tidar_core.batcher import Batcher, complete
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoder import Decoder
from tidar_core.errors import BundleError, ConfigError, TidarError
from tidar_core.request import DecodeStep, Request

__all__ = ["DecoderApp", "Served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model whose name was looked up once, so that every replica loads the same weights."""

    settings: ServeSettings
    bundle_uri: str
    bundle_hash: str
    block_len: int
    """K of the decoder: 1 in the autoregressive mode."""


class DecoderApp:
    """One replica of the decoder."""

    def __init__(self, served: Served) -> None:
        settings = served.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"num_gpus is {settings.num_gpus} and torch sees no GPU; set num_gpus to 0")
        bundle = load_bundle(served.bundle_uri, dtype=DTYPES[settings.dtype], device=settings.device)
        if bundle.info.bundle_hash != served.bundle_hash:
            raise BundleError(
                f"{served.bundle_uri} has hash {bundle.info.bundle_hash}; the service was started with "
                f"{served.bundle_hash}; restart it to serve the new bundle"
            )
        self._tokenizer = bundle.tokenizer
        self._block_len = served.block_len
        draft = DraftConfig(block_len=served.block_len, kind=settings.draft_kind)
        decoder = Decoder(
            bundle.model, draft, rows=settings.rows, context_len=settings.context_len, pages=settings.pages
        )
        planner = bundle_planner(settings.mode, served.bundle_uri, decoder)
        self._batcher = Batcher(decoder, planner, max_waiting=settings.max_waiting)
        template = load_chat_template(served.bundle_uri, instead=settings.chat_template)
        self._info = _tokenizer_info(served.bundle_uri, template)
        self._context_len = decoder.context_len
        self._prompts = PromptReader(
            bundle.tokenizer,
            template,
            vocab_size=bundle.model.config.vocab_size,
            context_len=decoder.context_len,
            tool_form=None if template is None else form_of(template, settings.tool_form),
        )
        _warm_up(self._batcher, self._tokenizer.eos_id)
        self._loop = BatchLoop(self._batcher)
        self._name = secrets.token_hex(4)

    async def generate(self, request: PromptRequest) -> AsyncGenerator[Piece | Failed, None]:
        """Pieces of the completion of `request`, an empty one first once it is admitted.

        Closing the generator, or cancelling who waits on it, frees the row. An error that this project raises on
        purpose is the last event, so that it crosses the process border as itself.
        """
        try:
            async with aclosing(self._pieces(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except TidarError as error:
            yield Failed(error)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized | Failed:
        """The tokens of a prompt, as `generate` reads it; with their names if they are wanted `spelled`."""
        try:
            tokens = await asyncio.to_thread(self._prompts.tokens, prompt, framed=framed)
        except TidarError as error:
            return Failed(error)
        return Tokenized(
            count=len(tokens),
            max_model_len=self._context_len,
            tokens=list(tokens),
            token_strs=[self._tokenizer.spell(token) for token in tokens] if spelled else None,
        )

    async def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, special ones by their names."""
        return await asyncio.to_thread(self._tokenizer.decode, tokens, skip_special=False)

    async def tokenizer_info(self) -> TokenizerInfo:
        """What the tokenizer's configuration says."""
        return self._info

    async def ready(self) -> bool:
        """True: whoever can be asked has loaded its model and run it once."""
        return True

    async def load(self) -> Load:
        """How busy this replica is."""
        return load_of(self._batcher, self._name)

    def check_health(self) -> None:
        """Raise if this replica should be replaced."""
        self._loop.check_health()

    async def _pieces(self, asked: PromptRequest) -> AsyncGenerator[Piece, None]:
        wanted = await asyncio.to_thread(self._prompts.request, asked)
        transcript = self._transcript(asked, wanted)
        async with aclosing(self._loop.steps(wanted, self._until(asked, wanted))) as batches:
            admitted = False
            async for steps in batches:
                transcript.add(steps)
                if transcript.finish_reason == "stop" and transcript.stop_reason is None:
                    self._prompts.check_grammar(asked, wanted)
                if not admitted or transcript.finish_reason or (asked.pieces and transcript.pending):
                    piece = transcript.take()
                    calls = not admitted and asked.tools is not None
                    yield replace(piece, tool_form=self._prompts.tool_form) if calls else piece
                    admitted = True

    def _until(self, asked: PromptRequest, wanted: Request) -> Callable[[DecodeStep], bool] | None:
        """Says in the decoder's thread which step completes a stop string, so that the row is free before the next."""
        if not asked.stop:
            return None
        twin = self._transcript(replace(asked, echo=False, logprobs=None, prompt_logprobs=None), wanted)
        return lambda step: twin.add([step]).finish_reason is not None

    def _transcript(self, asked: PromptRequest, wanted: Request) -> Transcript:
        return Transcript(self._tokenizer, asked, wanted.prompt, block_len=self._block_len)


def _tokenizer_info(bundle_uri: str, template: ChatTemplate | None) -> TokenizerInfo:
    config = locations.read_json(locations.join(bundle_uri, "tokenizer_config.json"))
    sources = None if template is None else template.sources
    shown = sources["default"] if sources is not None and len(sources) == 1 else sources
    return TokenizerInfo.model_validate(config | {"chat_template": shown})


def _warm_up(batcher: Batcher, token_id: int) -> None:
    """One prefill and one decode step, so that the first client does not pay for what is compiled or allocated late."""
    sampling = SamplingConfig(max_tokens=2)
    complete(batcher, [Request(request_id="warm-up", prompt=(token_id,), sampling=sampling)])
