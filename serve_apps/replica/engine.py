"""Decodes with one set of weights: a bundle on one device, and a loop that batches all requests.

The weights never change, except drafts of a frozen checkpoint: other weights are another engine. A replica runs its
engines in child processes (`engine_client`, `engine_server`), or in its own process.
"""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

import torch

from serve_apps.api.tokenize_api import Tokenized
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load
from serve_apps.messages.request_timing import TimingRecorder
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.messages.tokenizer_info import TokenizerInfo
from serve_apps.replica.bundle_runtime import BundleRuntime
from serve_apps.replica.decode_loop import DecodeLoop
from serve_apps.replica.delta_queue import DeltaQueue
from serve_apps.replica.delta_receiver import DeltaReceiver
from serve_apps.replica.engine_load import load_of
from serve_apps.replica.grammar_pool import GrammarPool
from serve_apps.replica.prompt_lanes import PromptLanes
from serve_apps.replica.replica_memory import replica_memory
from serve_apps.rollout.model_version import ModelVersion
from tidar_core.artifacts.model.bundle_info import hf_location
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import ChatTemplate, tokenizer_config
from tidar_core.config import SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import ConfigError, TokenizerError

__all__ = ["Engine"]

SWITCH_SECONDS = 0.0005
"""Longest time that the event loop may keep the interpreter lock while the decoder's thread waits for it. Python's
default of 5 ms is a whole decode step of a small model."""


class Engine:
    """A bundle, its decode loop, and the threads that encode prompts."""

    def __init__(
        self,
        served: ModelVersion,
        report: Callable[[str], None] = lambda line: None,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the weights and run them once. Raises BundleError or ConfigError.

        report  called with one line at the start of each stage
        flush   called in the decoder's thread after each forward that sent deltas
        """
        self.served = served
        settings = served.settings
        sys.setswitchinterval(SWITCH_SECONDS)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"num_gpus is {settings.num_gpus} and torch sees no GPU; set num_gpus to 0")
        began = time.monotonic()
        report(replica_memory(served).line)
        report(f"weights are loaded from {served.bundle_uri}")
        self._runtime = BundleRuntime.load(served)
        self.tokenizer_info = _tokenizer_info(hf_location(served.bundle_uri), self._runtime.template)
        self.tool_form = self._runtime.tool_form
        self.scheduler = self._runtime.scheduler(
            served.mode, max_waiting=settings.max_waiting, budget=settings.timing_seconds, report=report
        )
        self._tokenizer, self._prompts = self._runtime.tokenizer, self._runtime.prompts
        self._tokenizer.spell(self._tokenizer.eos_id)  # all names are made now, and not while texts are sent
        self._lanes = PromptLanes(self._prompts, GrammarPool(self._tokenizer))
        report("a first request is decoded")
        _warm_up(self.scheduler, self._tokenizer.eos_id)
        report(f"ready to decode after {time.monotonic() - began:.1f} s")
        self.loop = DecodeLoop(
            self.scheduler,
            interval=settings.stream_interval_seconds,
            max_waiting_tokens=settings.max_waiting_tokens,
            flush=flush,
        )

    async def load_drafts(self, served: ModelVersion) -> None:
        """Serve a version with the same base from now on: its drafts are exchanged between two forwards.

        Texts in flight go on, and keep the fingerprint under which they began. Raises TidarError, and keeps the drafts,
        if the new drafts cannot be loaded.
        """
        drafts = await asyncio.to_thread(self._runtime.read_drafts, served)
        await self.loop.between_forwards(partial(self.scheduler.load_drafts, drafts))
        self.served = served

    async def check_health(self) -> None:
        """Raise RuntimeError unless a forward succeeds; an idle engine decodes two tokens of its own."""
        await self.loop.probe(self._tokenizer.eos_id, self.served.settings.hang_seconds)

    async def load(self, replica: str) -> Load:
        """Load of this engine, under the name of its replica."""
        return load_of(self.scheduler, self.loop.throughput, replica)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized:
        """Tokens of a prompt, as `generate` encodes it; with their names if `spelled` is set.

        framed  add the special tokens that frame a text
        """
        tokens = await self._lanes.tokens(prompt, framed=framed)
        return Tokenized(
            count=len(tokens),
            max_model_len=self.scheduler.decoder.context_len,
            tokens=list(tokens),
            token_strs=await asyncio.to_thread(self._spelled, tokens) if spelled else None,
        )

    def _spelled(self, tokens: Sequence[int]) -> list[str]:
        return [self._tokenizer.spell(token) for token in tokens]

    async def detokenize(self, tokens: list[int]) -> str:
        """Text of tokens; special tokens appear by their names. Raises RequestError."""
        self._prompts.check_ids("tokens", tokens)
        return await asyncio.to_thread(self._tokenizer.decode, tokens, skip_special=False)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Deltas of the text of `request`, the first once it is admitted. Closed early, it frees the slot of the text.
        Raises RequestError, CapacityError or TidarError."""
        queue = DeltaQueue()
        end = await self.submit(request, queue.put)
        try:
            finished = False
            while not finished:
                delta = await queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            end()

    async def submit(
        self, request: GenerationRequest, send: Callable[[TextDelta | GenerationFailed], None]
    ) -> Callable[[], None]:
        """Encode the prompt of `request` and start its text. Returns a function that ends the text early. Raises
        RequestError.

        send  called in the decoder's thread with each delta; the last one has a finish_reason or is an error
        """
        encoded = await self._lanes.request(request)
        timing = TimingRecorder()
        receiver = DeltaReceiver(
            self._tokenizer,
            request,
            encoded.prompt,
            send,
            block_len=self.served.block_len,
            fingerprint=self.served.fingerprint,
            tool_form=self.tool_form,
            timing=timing,
            check_end=partial(self._prompts.check_grammar, request, encoded),
        )
        return self.loop.start(encoded, receiver, timing)

    def stop(self) -> None:
        """End after the forward in flight; requests that still run fail."""
        self.loop.stop()
        self._lanes.stop()


def _tokenizer_info(folder: str, template: ChatTemplate | None) -> TokenizerInfo:
    config = tokenizer_config(locations.local_copy(folder))
    sources = None if template is None else template.sources
    shown = sources["default"] if sources is not None and len(sources) == 1 else sources
    named = config.get("tokenizer_class")
    if named is not None and not isinstance(named, str):
        raise TokenizerError(f"tokenizer_config.json has tokenizer_class {named!r}; it must be a text; correct it")
    return TokenizerInfo.model_validate(config | {"chat_template": shown})


def _warm_up(scheduler: Scheduler, token_id: int) -> None:
    """Run one prefill and one decode step, so that the first client does not wait for compilation and allocation."""
    sampling = SamplingConfig(max_tokens=2)
    complete(scheduler, [Request(request_id="warm-up", prompt=(token_id,), sampling=sampling)])
