"""Benchmark of long prompts.

How long is a prompt read, how fast is a decode step behind it, and how long do others wait meanwhile?

Prompts are random tokens: the time of a forward does not depend on their values. All decoding is autoregressive.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tidar_core.config import AUTOREGRESSIVE, DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import RequestError
from tidar_core.timing import Clock
from tidar_core.transformer.model import TidarModel

__all__ = ["ROOM", "PromptCost", "prompt_costs", "random_prompt", "require_room"]

STREAM_TOKENS = 16
"""Tokens of the prompt of the stream that others disturb."""
STEPS = 16
"""Decode steps that are timed behind a prompt, and of the stream before a prompt comes."""
MOST_GAPS = 150
"""Gaps of the stream that are timed."""
BESIDE = 1024
"""Last tokens of a prompt, which are read beside the stream. Their chunks see most keys, so gaps are longest."""
ROOM = 1 + STEPS
"""Tokens of the context that are kept free behind a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCost:
    """Times of one prompt length."""

    prompt_tokens: int
    first_token_seconds: float
    """Seconds from submission to the first token, with nothing beside; median over repeats."""
    tokens_per_second: float
    """Tokens of the prompt over these seconds."""
    first_chunk_seconds: float
    """Seconds of the first forward of the prompt; median over repeats."""
    last_chunk_seconds: float
    """Seconds of the last forward, which may have fewer tokens."""
    step_seconds: float
    """Median seconds of an autoregressive decode step behind the prompt."""
    gap_steps: float
    """Time between two tokens of another stream while the prompt's end is read, in its decode steps: the median."""
    longest_gap_steps: float
    """The same at 95 %."""
    peak_bytes: int
    """Most memory of the process so far on a CPU, weights and program included; on a GPU, of all tensors."""


def require_room(model: TidarModel, lengths: Sequence[int]) -> None:
    """Raise RequestError if the model's context cannot hold a prompt and the steps behind it."""
    longest, context = max(*lengths, STREAM_TOKENS + ROOM), model.config.context_len
    if longest + ROOM > context:
        raise RequestError(
            f"--prompt-len is {longest}; with {ROOM} tokens behind it, it must not exceed the context of {context}; "
            f"give at most {context - ROOM}"
        )


def random_prompt(model: TidarModel, length: int) -> tuple[int, ...]:
    """Random tokens of text; the same ones each time."""
    draw, mask_id = torch.Generator().manual_seed(length), model.config.mask_id
    token_L = torch.randint(model.config.vocab_size - 1, (length,), generator=draw)
    return tuple((token_L if mask_id is None else token_L + (token_L >= mask_id)).tolist())


def prompt_costs(
    model: TidarModel,
    lengths: Sequence[int],
    *,
    repeats: int,
    on_prompt: Callable[[PromptCost], None] = lambda cost: None,
    clock: Clock = time.perf_counter,
) -> list[PromptCost]:
    """Time prompts of each length, shortest first.

    lengths    tokens of a prompt; `require_room` holds
    repeats    times that a prompt is read alone
    on_prompt  called after each length
    """
    costs = []
    for length in sorted(set(lengths)):
        prompt = random_prompt(model, length)
        context_len = max(length, STREAM_TOKENS) + ROOM
        alone = Decoder(model, DraftConfig(block_len=1), slots=1, context_len=context_len)
        runs = [_read_alone(alone, prompt, clock) for _ in range(repeats)]
        del alone
        median, longest = _gaps(model, prompt, clock)
        first = statistics.median(sum(chunks) for chunks, _ in runs)
        cost = PromptCost(
            prompt_tokens=length,
            first_token_seconds=first,
            tokens_per_second=length / first,
            first_chunk_seconds=statistics.median(chunks[0] for chunks, _ in runs),
            last_chunk_seconds=statistics.median(chunks[-1] for chunks, _ in runs),
            step_seconds=statistics.median(step for _, steps in runs for step in steps),
            gap_steps=median,
            longest_gap_steps=longest,
            peak_bytes=_peak_bytes(model),
        )
        costs.append(cost)
        on_prompt(cost)
    return costs


def _read_alone(decoder: Decoder, prompt: tuple[int, ...], clock: Clock) -> tuple[list[float], list[float]]:
    """Seconds of each forward that reads the prompt, and of each decode step behind it."""
    scheduler = _scheduler(decoder, clock)
    scheduler.submit(_request("alone", prompt, STEPS + 1))
    chunks: list[float] = []
    while not chunks or not scheduler.running:
        chunks.append(_seconds(scheduler, clock))
    steps = [_seconds(scheduler, clock) for _ in range(STEPS)]
    assert not scheduler.busy
    return chunks, steps


def _gaps(model: TidarModel, prompt: tuple[int, ...], clock: Clock) -> tuple[float, float]:
    """Gaps of a stream while a prompt is read, in decode steps of the stream: median, and at 95 %."""
    most = min(MOST_GAPS, model.config.context_len - STREAM_TOKENS - ROOM - 2)
    context_len = max(len(prompt) + 1, STREAM_TOKENS + ROOM + most + 2)
    decoder = Decoder(model, DraftConfig(block_len=1), slots=2, context_len=context_len)
    scheduler = _scheduler(decoder, clock)
    scheduler.submit(_request("stream", prompt[:1] * STREAM_TOKENS, ROOM + most + 2))
    scheduler.advance()
    step = statistics.median(_seconds(scheduler, clock) for _ in range(STEPS))
    scheduler.submit(_request("beside", prompt, 1))
    if len(prompt) > BESIDE:
        scheduler.prefill(len(prompt) - BESIDE)
    gaps: list[float] = []
    while len(gaps) < most and len(scheduler.running) + len(scheduler.arriving) == 2:
        gaps.append(_seconds(scheduler, clock) / step)
    for request_id in ("stream", "beside"):
        scheduler.abort(request_id)
    return statistics.median(gaps), sorted(gaps)[int(0.95 * (len(gaps) - 1))]


def _scheduler(decoder: Decoder, clock: Clock) -> Scheduler:
    return Scheduler(decoder, FixedMode(AUTOREGRESSIVE, 1), share_prefixes=False, clock=clock)


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    return Request(
        request_id=request_id, prompt=prompt, sampling=SamplingConfig(max_tokens=max_tokens), speculative=False
    )


def _seconds(scheduler: Scheduler, clock: Clock) -> float:
    began = clock()
    scheduler.advance()
    if scheduler.decoder.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def _peak_bytes(model: TidarModel) -> int:
    if model.embedding.weight.is_cuda:
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
