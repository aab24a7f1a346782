"""What does it take to decode with one set of weights?

A bundle, a decoder on one device, and a loop that batches all requests that reach it. Weights are never changed: other
weights are another engine. A replica has it in a process of its own (`engine_process`), or in its own.
"""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

import torch

from serve_apps.api.tokenize_api import Tokenized, TokenizerInfo
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.replica_load import Load, load_of
from serve_apps.messages.request_timing import RequestTiming, TimingRecorder
from serve_apps.replica.decode_loop import DecodeLoop
from serve_apps.replica.grammar_pool import GrammarPool
from serve_apps.replica.prompt_encoder import PromptEncoder
from serve_apps.replica.prompt_lanes import PromptLanes
from serve_apps.replica.replica_memory import replica_memory
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.streaming.tool_call_formats import form_of
from tidar_core.artifacts.model.bundle import DTYPES, load_bundle
from tidar_core.artifacts.model.latency_file import bundle_planner
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import ChatTemplate, load_chat_template
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.scheduler import Scheduler, complete
from tidar_core.errors import BundleError, ConfigError

__all__ = ["Engine", "Heard"]

SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter while a decoder's thread waits for it; Python's own 5 ms are a whole
decode step of a small model."""


class Heard(NamedTuple):
    """What has come of one request since it was last heard of; a tuple, to cross to another process at little cost."""

    steps: list[DecodeStep]
    lap: RequestTiming | None
    """Once it has tokens."""
    prompt: tuple[int, ...] = ()
    """Its tokens, the first time."""


class Engine:
    """One bundle at work."""

    def __init__(self, served: ModelVersion, report: Callable[[str], None] = lambda line: None) -> None:
        """Loads the weights and runs them once. Raises BundleError or ConfigError.

        report  takes one line at the start of each stage
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
        planner = bundle_planner(
            settings.mode, served.bundle_uri, decoder, budget=settings.timing_seconds, report=report
        )
        self.batcher = Scheduler(decoder, planner, max_waiting=settings.max_waiting)
        template = load_chat_template(served.bundle_uri, instead=settings.chat_template)
        self.tokenizer_info = _tokenizer_info(served.bundle_uri, template)
        self.tool_form = None if template is None else form_of(template, settings.tool_form)
        self._prompts = PromptEncoder(
            bundle.tokenizer,
            template,
            end_ids=bundle.end_ids,
            vocab_size=bundle.model.config.vocab_size,
            context_len=decoder.context_len,
            tool_form=self.tool_form,
        )
        self._lanes = PromptLanes(self._prompts, GrammarPool(bundle.tokenizer))
        report("a first text is decoded")
        _warm_up(self.batcher, self._tokenizer.eos_id)
        report(f"ready to decode after {time.monotonic() - began:.1f} s")
        self.loop = DecodeLoop(
            self.batcher,
            interval=settings.stream_interval_seconds,
            max_waiting_tokens=settings.max_waiting_tokens,
        )

    async def check_health(self) -> None:
        """Raise unless a forward succeeds; one of its own where no text is being written."""
        await self.loop.prove(self._tokenizer.eos_id, self.served.settings.hang_seconds)

    async def load(self, replica: str) -> Load:
        """How busy it is, for the replica of that name."""
        return load_of(self.batcher, self.loop.pace, replica)

    async def tokenize(self, prompt: str | Chat, *, framed: bool, spelled: bool) -> Tokenized:
        """The tokens of a prompt, as `pieces` reads it; with their names if they are wanted `spelled`."""
        tokens = await self._lanes.tokens(prompt, framed=framed)
        return Tokenized(
            count=len(tokens),
            max_model_len=self.batcher.decoder.context_len,
            tokens=list(tokens),
            token_strs=await asyncio.to_thread(self._spelled, tokens) if spelled else None,
        )

    def _spelled(self, tokens: Sequence[int]) -> list[str]:
        return [self._tokenizer.spell(token) for token in tokens]

    async def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, special ones by their names. Raises RequestError."""
        self._prompts.check_ids("tokens", tokens)
        return await asyncio.to_thread(self._tokenizer.decode, tokens, skip_special=False)

    async def steps(self, asked: GenerationRequest) -> AsyncGenerator[Heard, None]:
        """Decode steps of what is asked for, once it is admitted, and none at first if they are to come yet. Raises
        RequestError."""
        wanted = await self._lanes.request(asked)
        watch, prompt = TimingRecorder(), wanted.prompt
        async with aclosing(self.loop.steps(wanted, self._until(asked, wanted), watch)) as batches:
            async for steps in batches:
                if steps and steps[-1].finish_reason == "stop":
                    self._prompts.check_grammar(asked, wanted)
                yield Heard(steps, watch.lap, prompt)
                prompt = ()

    def stop(self) -> None:
        """End after the forward in flight; requests that still run fail."""
        self.loop.stop()
        self._lanes.stop()

    def _until(self, asked: GenerationRequest, wanted: Request) -> Callable[[DecodeStep], bool] | None:
        """Says in the decoder's thread which step completes a stop string, so that the row is free before the next."""
        if not asked.stop:
            return None
        silent = replace(asked, echo=False, logprobs=None, prompt_logprobs=None)
        twin = IncrementalDetokenizer(self._tokenizer, silent, wanted.prompt, block_len=self.served.block_len)
        return lambda step: twin.add([step]).finish_reason is not None


def _tokenizer_info(bundle_uri: str, template: ChatTemplate | None) -> TokenizerInfo:
    config = locations.read_json(locations.join(bundle_uri, "tokenizer_config.json"))
    sources = None if template is None else template.sources
    shown = sources["default"] if sources is not None and len(sources) == 1 else sources
    return TokenizerInfo.model_validate(config | {"chat_template": shown})


def _warm_up(batcher: Scheduler, token_id: int) -> None:
    """One prefill and one decode step, so that the first client does not pay for what is compiled or allocated late."""
    sampling = SamplingConfig(max_tokens=2)
    complete(batcher, [Request(request_id="warm-up", prompt=(token_id,), sampling=sampling)])
