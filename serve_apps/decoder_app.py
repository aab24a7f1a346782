"""What owns a model and its share of a machine?

A Ray Serve replica: a bundle, a decoder on one device, and a loop that batches all requests that reach it.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import torch

from serve_apps.batch_loop import BatchLoop
from serve_apps.events import Failed, Piece, Transcript
from serve_apps.schemas import PromptRequest
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.bundle import load_bundle
from tidar_core.batcher import Batcher, complete
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoder import Decoder
from tidar_core.errors import BundleError, ConfigError, TidarError
from tidar_core.planner import measured_planner
from tidar_core.request import Request

__all__ = ["DecoderApp", "Load", "Served"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model whose name was looked up once, so that every replica loads the same weights."""

    settings: ServeSettings
    bundle_uri: str
    bundle_hash: str
    block_len: int
    """K of the decoder: 1 in the autoregressive mode."""


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences in a replica."""

    running: int
    waiting: int


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
        decoder = Decoder(bundle.model, draft, rows=settings.rows, context_len=settings.context_len)
        planner = measured_planner(settings.mode, decoder)
        batcher = Batcher(decoder, planner, max_waiting=settings.max_waiting)
        _warm_up(batcher, self._tokenizer.eos_id)
        self._loop = BatchLoop(batcher)

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

    async def ready(self) -> bool:
        """True: whoever can be asked has loaded its model and run it once."""
        return True

    async def load(self) -> Load:
        """Sequences that run and wait here."""
        return Load(self._loop.running, self._loop.waiting)

    def check_health(self) -> None:
        """Raise if this replica should be replaced."""
        self._loop.check_health()

    async def _pieces(self, request: PromptRequest) -> AsyncGenerator[Piece, None]:
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = tuple(await asyncio.to_thread(self._tokenizer.encode, prompt))
        end_of_text = () if request.ignore_eos else (self._tokenizer.eos_id,)
        sampling = replace(request.sampling, eos_ids=(*end_of_text, *request.sampling.eos_ids))
        transcript = Transcript(self._tokenizer.stream(), prompt_tokens=len(prompt), block_len=self._block_len)
        wanted = Request(request_id=request.request_id, prompt=prompt, sampling=sampling)
        async with aclosing(self._loop.steps(wanted)) as batches:
            admitted = False
            async for steps in batches:
                transcript.add(steps)
                if not admitted or transcript.finish_reason or (request.pieces and transcript.pending):
                    yield transcript.take()
                    admitted = True


def _warm_up(batcher: Batcher, token_id: int) -> None:
    """One prefill and one decode step, so that the first client does not pay for what is compiled or allocated late."""
    sampling = SamplingConfig(max_tokens=2)
    complete(batcher, [Request(request_id="warm-up", prompt=(token_id,), sampling=sampling)])
