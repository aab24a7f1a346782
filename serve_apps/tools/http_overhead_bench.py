"""What does the way through HTTP cost?

    python -m serve_apps.tools.http_overhead_bench MODEL [--concurrency 1 8] [--max-tokens 128] [--repeats 3] [--json]

Streams the same prompts from a service on this machine and from its decoder in this process, in turns, and prints both
speeds, their ratio, and what a reader waits for. The client is aiohttp, which reads as lightly as Python can: it counts
events as they arrive and parses the last alone.
"""

import argparse
import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import aiohttp
import torch

from serve_apps import app
from serve_apps.replica.bundle_runtime import BundleRuntime
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import ConfigError, TidarError

__all__ = ["Flow", "Run", "compared", "figures", "in_process", "main", "over_http"]

TEXT = b'"text":'
"""An event with this in it brings text."""


@dataclass(slots=True)
class Flow:
    """One text, as whoever reads it sees it come."""

    asked: float = field(default_factory=time.perf_counter)
    heard: list[float] = field(default_factory=list)
    """When text came."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """All texts of one go."""

    flows: list[Flow]
    seconds: float


def in_process(scheduler: Scheduler, requests: Sequence[Request], concurrency: int) -> Run:
    """Decode `requests`, so many at once, and nothing else."""
    flows: dict[str, Flow] = {}
    waiting, began = iter(requests), time.perf_counter()

    def begin() -> None:
        if (request := next(waiting, None)) is not None:
            flows[request.request_id] = Flow()
            scheduler.submit(request)

    for _ in range(concurrency):
        begin()
    while scheduler.busy:
        for step in scheduler.advance():
            flow = flows[step.request_id]
            flow.heard.append(time.perf_counter())
            flow.tokens += len(step.token_ids)
            if step.finish_reason is not None:
                begin()
    return Run(list(flows.values()), time.perf_counter() - began)


async def over_http(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> Run:
    """Stream the answers to `bodies` from a service, so many at once."""
    flows: list[Flow] = []
    waiting, began = iter(bodies), time.perf_counter()
    async with aiohttp.ClientSession() as session:

        async def read_on() -> None:
            for body in waiting:
                flows.append(await _streamed(session, url, body))

        await asyncio.gather(*(read_on() for _ in range(concurrency)))
    return Run(flows, time.perf_counter() - began)


def figures(runs: Sequence[Run]) -> dict[str, float]:
    """Tokens per second of the median run; how long the first piece and each later one of all texts were waited for."""
    flows = [flow for run in runs for flow in run.flows]
    firsts = [flow.heard[0] - flow.asked for flow in flows]
    gaps = [after - before for flow in flows for before, after in zip(flow.heard, flow.heard[1:])]
    per_token = [(flow.heard[-1] - flow.heard[0]) / (flow.tokens - 1) for flow in flows if flow.tokens > 1]
    told: dict[str, float] = {
        "tokens_per_second": median(map(_speed, runs)),
        "tokens_per_piece": sum(flow.tokens for flow in flows) / sum(len(flow.heard) for flow in flows),
    }
    for name, values in (
        ("time_to_first_token_seconds", firsts),
        ("inter_token_latency_seconds", gaps),
        ("time_per_output_token_seconds", per_token),
    ):
        told |= {f"{name}_p50": _quantile(values, 0.5), f"{name}_p95": _quantile(values, 0.95)}
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and give the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        facts = _measured(asked)
    except TidarError as error:
        print(f"cost_bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts) if asked.json else _table(facts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_apps.tools.http_overhead_bench", description="What HTTP costs."
    )
    add = parser.add_argument
    add("model", help="bundle folder or URI, or models:/NAME@ALIAS")
    add("--concurrency", type=int, nargs="+", default=[1, 8], help="texts at once")
    add("--max-tokens", type=int, default=128, help="of each text, all of which are written")
    add("--texts", type=int, default=2, help="of each stream, one after the other")
    add("--repeats", type=int, default=3, help="in process and over HTTP, in turns")
    add("--prompts", help="JSONL with prompt, question, turns or text")
    add("--settings", default="{}", help="JSON of other settings of the service, such as mode or threads")
    add("--tracking-uri", default=ServeSettings.model_fields["tracking_uri"].default)
    add("--json", action="store_true", help="one JSON object")
    return parser


def _measured(asked: argparse.Namespace) -> dict[str, Any]:
    if min(asked.concurrency) < 1 or asked.max_tokens < 2 or asked.texts < 1 or asked.repeats < 1:
        raise ConfigError("concurrency, texts and repeats must be at least 1, max-tokens at least 2")
    wanted = {"threads": 1, "rows": max(asked.concurrency), "port": _free_port()} | _object(asked.settings)
    settings = ServeSettings.model_validate(wanted | {"model": asked.model, "tracking_uri": asked.tracking_uri})
    scheduler, tokenizer = _decoder(settings)
    prompts = read_prompts(asked.prompts, max(asked.concurrency))
    runs: dict[int, tuple[list[Run], list[Run]]] = {concurrency: ([], []) for concurrency in asked.concurrency}
    app.run(settings, blocking=False)
    try:
        url = f"http://{app.address_of(settings)}/v1/completions"
        for repeat in range(-1, asked.repeats):  # the first warms both up
            for concurrency, (inside, outside) in runs.items():
                texts = [prompts[i % len(prompts)] for i in range(concurrency * asked.texts)]
                requests = list(_requests(tokenizer, texts, asked.max_tokens))
                bodies = [_body(settings.shown_name, text, asked.max_tokens) for text in texts]
                one = in_process(scheduler, requests, concurrency)
                other = asyncio.run(over_http(url, bodies, concurrency))
                if repeat >= 0:
                    inside.append(one)
                    outside.append(other)
    finally:
        app.shutdown()
    return {
        "model": asked.model, "mode": settings.mode, "threads": settings.threads, "max_tokens": asked.max_tokens,
        "concurrency": {str(concurrency): compared(*both) for concurrency, both in runs.items()},
    }  # fmt: skip


def _decoder(settings: ServeSettings) -> tuple[Scheduler, Tokenizer]:
    """What a replica of the service has, here."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    served, _ = resolve_model(settings)
    runtime = BundleRuntime.load(served)
    return runtime.scheduler(settings.mode), runtime.tokenizer


def _requests(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Iterator[Request]:
    sampling = SamplingConfig(max_tokens=max_tokens)
    for number, text in enumerate(texts):
        yield Request(request_id=str(number), prompt=tuple(tokenizer.encode(text)), sampling=sampling)


def _body(model: str, text: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": text, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def _streamed(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Flow:
    flow, last = Flow(), b""
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        async for arrived in answer.content.iter_any():
            if TEXT in arrived:
                flow.heard.append(time.perf_counter())
            last = (last + arrived)[-4096:]
    *_, usage, done = last.decode(errors="ignore").strip().split("\n\n")
    if done != "data: [DONE]":
        raise TidarError(f"a stream ended without [DONE]: {done}")
    flow.tokens = json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]
    return flow


def compared(inside: Sequence[Run], outside: Sequence[Run]) -> dict[str, Any]:
    """Figures of both, and the ratio of each pair of runs that followed each other: a machine's speed drifts."""
    ratios = sorted(_speed(other) / _speed(one) for one, other in zip(inside, outside, strict=True))
    spread = {"ratio": median(ratios), "ratio_spread": [ratios[0], ratios[-1]]}
    return {"in_process": figures(inside), "http": figures(outside)} | spread


def _table(facts: dict[str, Any]) -> str:
    lines = [f"{facts['model']}, mode {facts['mode']}, {facts['threads']} threads, {facts['max_tokens']} tokens a text"]
    lines.append(f"{'':28}{'tokens/s':>10}{'first ms':>16}{'piece ms':>16}{'tokens':>8}")
    for concurrency, both in facts["concurrency"].items():
        for name in ("in_process", "http"):
            told = both[name]
            waits = "".join(
                f"{1000 * told[wait + '_p50']:>9.1f}{1000 * told[wait + '_p95']:>7.1f}"
                for wait in ("time_to_first_token_seconds", "inter_token_latency_seconds")
            )
            where = f"{concurrency} at once, {name.replace('_', ' ')}"
            lines.append(f"{where:28}{told['tokens_per_second']:>10.1f}{waits}{told['tokens_per_piece']:>8.2f}")
        least, most = both["ratio_spread"]
        lines.append(f"{concurrency + ' at once, ratio':28}{both['ratio']:>10.2f} ({least:.2f} to {most:.2f})")
    return "\n".join(lines)


def _speed(run: Run) -> float:
    return sum(flow.tokens for flow in run.flows) / run.seconds


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--settings is {text!r}, which is not JSON: {error}; give a JSON object") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--settings is {text}; it must be a JSON object of settings of the service")
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
