"""Benchmark of the overhead of HTTP over decoding in the same process.

    python -m serve_apps.tools.http_overhead_bench MODEL [--concurrency 1 8] [--max-tokens 128] [--repeats 3] [--json]

Streams the same prompts from a service on this machine and from its decoder in this process, in turns. Prints both
speeds, their ratio, and latencies of deltas. The client is aiohttp, with as little work as Python allows: it counts
events as they arrive and parses only the last event.
"""

import argparse
import asyncio
import json
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
from tidar_core.given_json import object_of_option

__all__ = ["Flow", "Run", "compared", "figures", "in_process", "main", "over_http"]

TEXT = b'"text":'
"""Bytes that an event with text contains."""


@dataclass(slots=True)
class Flow:
    """Times of a text as its reader measures them, in seconds."""

    sent: float = field(default_factory=time.perf_counter)
    """Time of the request."""
    arrivals: list[float] = field(default_factory=list)
    """Times at which text arrived."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """All texts of a measured run."""

    flows: list[Flow]
    seconds: float


def in_process(scheduler: Scheduler, requests: Sequence[Request], concurrency: int) -> Run:
    """Decode `requests` in this process, `concurrency` at the same time."""
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
            flow.arrivals.append(time.perf_counter())
            flow.tokens += len(step.token_ids)
            if step.finish_reason is not None:
                begin()
    return Run(list(flows.values()), time.perf_counter() - began)


async def over_http(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> Run:
    """Stream the responses to `bodies` from a service, `concurrency` at the same time."""
    flows: list[Flow] = []
    waiting, began = iter(bodies), time.perf_counter()
    async with aiohttp.ClientSession() as session:

        async def read_on() -> None:
            for body in waiting:
                flows.append(await _streamed(session, url, body))

        await asyncio.gather(*(read_on() for _ in range(concurrency)))
    return Run(flows, time.perf_counter() - began)


def figures(runs: Sequence[Run]) -> dict[str, float]:
    """Tokens per second of the median run, and times to the first delta and between deltas over all texts."""
    flows = [flow for run in runs for flow in run.flows]
    firsts = [flow.arrivals[0] - flow.sent for flow in flows]
    gaps = [after - before for flow in flows for before, after in zip(flow.arrivals, flow.arrivals[1:])]
    per_token = [(flow.arrivals[-1] - flow.arrivals[0]) / (flow.tokens - 1) for flow in flows if flow.tokens > 1]
    values_by_name: dict[str, float] = {
        "tokens_per_second": median(map(_speed, runs)),
        "tokens_per_piece": sum(flow.tokens for flow in flows) / sum(len(flow.arrivals) for flow in flows),
    }
    for name, values in (
        ("time_to_first_token_seconds", firsts),
        ("inter_token_latency_seconds", gaps),
        ("time_per_output_token_seconds", per_token),
    ):
        values_by_name |= {f"{name}_p50": _quantile(values, 0.5), f"{name}_p95": _quantile(values, 0.95)}
    return values_by_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the figures and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        facts = _measured(options)
    except TidarError as error:
        print(f"http_overhead_bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts) if options.json else _table(facts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_apps.tools.http_overhead_bench", description="Measure the overhead of HTTP."
    )
    add = parser.add_argument
    add("model", help="bundle folder or URI, or models:/NAME@ALIAS")
    add("--concurrency", type=int, nargs="+", default=[1, 8], help="texts generated at the same time")
    add("--max-tokens", type=int, default=128, help="tokens of each text; all are generated")
    add("--texts", type=int, default=2, help="texts of each stream, one after the other")
    add("--repeats", type=int, default=3, help="measured pairs of runs: in process and over HTTP, in turns")
    add("--prompts", help="JSONL with prompt, question, turns or text")
    add("--settings", default="{}", help="JSON of other settings of the service, such as port, mode or threads")
    add("--tracking-uri", default=ServeSettings.model_fields["tracking_uri"].default)
    add("--json", action="store_true", help="one JSON object")
    return parser


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    if min(options.concurrency) < 1 or options.max_tokens < 2 or options.texts < 1 or options.repeats < 1:
        raise ConfigError("concurrency, texts and repeats must be at least 1, max-tokens at least 2")
    given = object_of_option("--settings", options.settings, '{"port": 8001}')
    wanted = {"threads": 1, "rows": max(options.concurrency)} | given
    settings = ServeSettings.model_validate(wanted | {"model": options.model, "tracking_uri": options.tracking_uri})
    scheduler, tokenizer = _decoder(settings)
    prompts = read_prompts(options.prompts, max(options.concurrency))
    runs: dict[int, tuple[list[Run], list[Run]]] = {concurrency: ([], []) for concurrency in options.concurrency}
    app.run(settings, blocking=False)
    try:
        url = f"http://{app.address_of(settings)}/v1/completions"
        for repeat in range(-1, options.repeats):  # the first repeat warms both up
            for concurrency, (inside, outside) in runs.items():
                texts = [prompts[i % len(prompts)] for i in range(concurrency * options.texts)]
                requests = list(_requests(tokenizer, texts, options.max_tokens))
                bodies = [_body(settings.shown_name, text, options.max_tokens) for text in texts]
                one = in_process(scheduler, requests, concurrency)
                other = asyncio.run(over_http(url, bodies, concurrency))
                if repeat >= 0:
                    inside.append(one)
                    outside.append(other)
    finally:
        app.shutdown()
    return {
        "model": options.model, "mode": settings.mode, "threads": settings.threads, "max_tokens": options.max_tokens,
        "concurrency": {str(concurrency): compared(*both) for concurrency, both in runs.items()},
    }  # fmt: skip


def _decoder(settings: ServeSettings) -> tuple[Scheduler, Tokenizer]:
    """Scheduler and tokenizer as a replica of the service has them, in this process."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    served, _ = resolve_model(settings)
    runtime = BundleRuntime.load(served)
    return runtime.scheduler(served.mode), runtime.tokenizer


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
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for arrived in response.content.iter_any():
            if TEXT in arrived:
                flow.arrivals.append(time.perf_counter())
            last = (last + arrived)[-4096:]
    *_, usage, done = last.decode(errors="ignore").strip().split("\n\n")
    if done != "data: [DONE]":
        raise TidarError(f"a stream ended without [DONE]: {done}")
    flow.tokens = json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]
    return flow


def compared(inside: Sequence[Run], outside: Sequence[Run]) -> dict[str, Any]:
    """Figures of both, and the ratio of speeds within each pair of adjacent runs, because a machine's speed drifts."""
    ratios = sorted(_speed(other) / _speed(one) for one, other in zip(inside, outside, strict=True))
    spread = {"ratio": median(ratios), "ratio_spread": [ratios[0], ratios[-1]]}
    return {"in_process": figures(inside), "http": figures(outside)} | spread


def _table(facts: dict[str, Any]) -> str:
    lines = [f"{facts['model']}, mode {facts['mode']}, {facts['threads']} threads, {facts['max_tokens']} tokens a text"]
    lines.append(f"{'':28}{'tokens/s':>10}{'first ms':>16}{'piece ms':>16}{'tokens':>8}")
    for concurrency, both in facts["concurrency"].items():
        for name in ("in_process", "http"):
            values = both[name]
            waits = "".join(
                f"{1000 * values[wait + '_p50']:>9.1f}{1000 * values[wait + '_p95']:>7.1f}"
                for wait in ("time_to_first_token_seconds", "inter_token_latency_seconds")
            )
            where = f"{concurrency} at once, {name.replace('_', ' ')}"
            lines.append(f"{where:28}{values['tokens_per_second']:>10.1f}{waits}{values['tokens_per_piece']:>8.2f}")
        least, most = both["ratio_spread"]
        lines.append(f"{concurrency + ' at once, ratio':28}{both['ratio']:>10.2f} ({least:.2f} to {most:.2f})")
    return "\n".join(lines)


def _speed(run: Run) -> float:
    return sum(flow.tokens for flow in run.flows) / run.seconds


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


if __name__ == "__main__":
    sys.exit(main())
