"""Prometheus metrics of an ingress and its decoder replicas.

A total belongs to a process, which is the ingress or a replica. Rates and ratios are left to the queries. Names follow
vLLM's, with the prefix `tidar`.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_apps.messages.replica_load import Load
from serve_apps.messages.text_delta import TextDelta, UsageCounts

__all__ = ["PREFIX", "Counters", "gauges", "text_of"]

PREFIX, VLLM = "tidar", "vllm"
SPEC_DECODE = "spec_decode_"
"""Prefix of the names that vLLM's own tools look for."""
TOTALS: dict[str, tuple[str, str | None]] = {
    "requests": ("Completion requests by HTTP status; a stream counts by its first status.", "status"),
    "requests_ended_early": ("Streams that an error ended.", None),
    "requests_abandoned": (
        "Requests whose client disconnected: during the body, before the response, during the stream.", "phase",
    ),
    "request_success": ("Completed texts, by their reason to end.", "finished_reason"),
    "prompt_tokens": ("Prompt tokens.", None),
    "generation_tokens": ("Generated tokens.", None),
    "spec_decode_num_drafts": ("Decode steps that verified a draft.", None),
    "spec_decode_num_draft_tokens": ("Verified speculative tokens: K - 1 for each draft.", None),
    "spec_decode_num_accepted_tokens": ("Accepted speculative tokens.", None),
    "spec_decode_num_accepted_tokens_per_pos": (
        "Accepted speculative tokens by their position in the draft, from 0.", "position",
    ),
}  # fmt: skip
"""Meaning of each total, and its label besides the model's name."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
SPREADS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Time from the parsed request to each text's first token.", SECONDS),
    "inter_token_latency_seconds": ("Time between two deltas of a stream, each of one or more decode steps.", SECONDS),
    "request_time_per_output_token_seconds": ("A text's decode time over its tokens after the first.", SECONDS),
    "e2e_request_latency_seconds": ("Time from the parsed request to each text's end.", SECONDS),
    "request_queue_time_seconds": ("Time that a text waits for a slot of its replica.", SECONDS),
    "request_prefill_time_seconds": ("Time from the slot to the first token.", SECONDS),
    "request_decode_time_seconds": ("Time from the first token to the last.", SECONDS),
    "request_inference_time_seconds": ("Prefill and decode time together.", SECONDS),
    "request_prompt_tokens": ("Tokens of a text's prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of a text.", TOKENS),
}
"""Meaning of each histogram, and the bounds of its buckets."""
OF_REPLICAS: dict[str, tuple[type[Any], str, Callable[[Load], float | None]]] = {
    "num_requests_running": (GaugeMetricFamily, "Sequences that hold a slot.", lambda load: load.running),
    "num_requests_waiting": (GaugeMetricFamily, "Sequences that wait for a slot.", lambda load: load.waiting),
    "num_tokens_waiting": (
        GaugeMetricFamily,
        "Prompt tokens and expected tokens of waiting sequences.",
        lambda load: load.waiting_tokens,
    ),
    "tokens_per_forward": (
        GaugeMetricFamily, "Recent tokens per forward, prompts included.", lambda load: load.tokens_per_forward
    ),
    "forwards_per_second": (
        GaugeMetricFamily, "Recent forwards per second while busy.", lambda load: load.forwards_per_second
    ),
    "kv_cache_pages": (GaugeMetricFamily, "Pages of the KV cache.", lambda load: load.pages),
    "kv_cache_pages_used": (GaugeMetricFamily, "Pages that sequences hold.", lambda load: load.pages_held),
    "kv_cache_usage_perc": (
        GaugeMetricFamily, "Share of the pages that sequences hold.", lambda load: load.pages_held / load.pages
    ),
    "prefix_cache_hits": (CounterMetricFamily, "Prompt tokens found in the cache.", lambda load: load.shared_tokens),
    "num_preemptions": (CounterMetricFamily, "Sequences that gave up their pages.", lambda load: load.preemptions),
    "decode_mode": (GaugeMetricFamily, "1 for the mode that the planner has chosen.", lambda load: 1),
    "decode_expected_speedup": (
        GaugeMetricFamily,
        "Expected tokens per second of the chosen mode over the autoregressive mode; absent if the mode is fixed.",
        lambda load: load.expected_over_ar,
    ),
}  # fmt: skip
"""Type, meaning and value of each metric of a replica."""


class Counters:
    """Totals and histograms since this process began."""

    def __init__(self, model_name: str, *, vllm_names: bool = False) -> None:
        """vllm_names  metrics of drafts appear under vLLM's names too, for tools that know only these names"""
        disable_created_metrics()
        self._model_name, self._vllm_names = model_name, vllm_names
        self._registry = CollectorRegistry()
        self._totals: dict[str, Counter] = {}
        for name, (meaning, label) in TOTALS.items():
            labels = ["model_name", *filter(None, [label])]
            self._totals[name] = Counter(f"{PREFIX}:{name}", meaning, labels, registry=self._registry)
        self._spreads = {
            name: Histogram(f"{PREFIX}:{name}", meaning, ["model_name"], buckets=bounds, registry=self._registry)
            for name, (meaning, bounds) in SPREADS.items()
        }
        for name, (_, label) in TOTALS.items():
            if label is None:
                self._count(name, 0)
        for spread in self._spreads.values():
            spread.labels(model_name)

    def count_answer(self, status: int) -> None:
        """Count a request by the status of its response."""
        self._count("requests", 1, str(status))

    def count_break(self) -> None:
        """Count a stream that an error ended early."""
        self._count("requests_ended_early", 1)

    def count_abandoned(self, phase: Literal["body", "answer", "stream"]) -> None:
        """Count a request whose client disconnected."""
        self._count("requests_abandoned", 1, phase)

    def count_tokens(self, usage: UsageCounts) -> None:
        """Count the tokens of a request."""
        self._count("prompt_tokens", usage.prompt_tokens)
        self._count("generation_tokens", usage.completion_tokens)
        if usage.drafts_per_step:
            self._count("spec_decode_num_drafts", usage.decode_steps)
            self._count("spec_decode_num_draft_tokens", usage.drafted_tokens)
            self._count("spec_decode_num_accepted_tokens", usage.accepted_tokens)
            for position in range(usage.drafts_per_step):
                accepted = sum(usage.histogram[position + 1 :])
                self._count("spec_decode_num_accepted_tokens_per_pos", accepted, str(position))

    async def timed(
        self, deltas: AsyncGenerator[tuple[int, TextDelta], None], *, streamed: bool
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Pass on and time the deltas of a request that was parsed just now; closes `deltas` at the end.

        streamed  the client receives each delta at once; otherwise it receives the whole text with the last delta
        """
        began, sent = time.monotonic(), dict[tuple[int, int], float]()
        async with aclosing(deltas):
            async for index, delta in deltas:
                now = time.monotonic()
                if delta.usage.completion_tokens and (delta.finish_reason is not None or (streamed and delta.text)):
                    if (text := (index, delta.attempt)) in sent:
                        self._spread("inter_token_latency_seconds", now - sent[text])
                    else:
                        decode = 0.0 if delta.timing is None else delta.timing.decode  # the whole text is this delta
                        self._spread("time_to_first_token_seconds", now - began - decode)
                    sent[text] = now
                if delta.finish_reason is not None:
                    self._spread("e2e_request_latency_seconds", now - began)
                    self._count_text(delta)
                yield index, delta

    def exposition(self) -> str:
        """All totals and histograms in Prometheus' text format."""
        families = list(self._registry.collect())
        if self._vllm_names:
            families += [_under_vllms_name(family) for family in families if SPEC_DECODE in family.name]
        return text_of(families)

    def _count_text(self, last: TextDelta) -> None:
        self._count("request_success", 1, str(last.finish_reason))
        tokens = last.usage.completion_tokens
        self._spread("request_prompt_tokens", last.usage.prompt_tokens)
        self._spread("request_generation_tokens", tokens)
        if last.timing is None:
            return
        self._spread("request_queue_time_seconds", last.timing.queue)
        self._spread("request_prefill_time_seconds", last.timing.prefill)
        self._spread("request_decode_time_seconds", last.timing.decode)
        self._spread("request_inference_time_seconds", last.timing.prefill + last.timing.decode)
        if tokens > 1:
            self._spread("request_time_per_output_token_seconds", last.timing.decode / (tokens - 1))

    def _count(self, name: str, more: float, *labels: str) -> None:
        self._totals[name].labels(self._model_name, *labels).inc(more)

    def _spread(self, name: str, value: float) -> None:
        self._spreads[name].labels(self._model_name).observe(value)


def gauges(model_name: str, loads: Sequence[Load]) -> str:
    """Metrics of the replicas in Prometheus' text format."""
    families = []
    for name, (kind, meaning, value_of) in OF_REPLICAS.items():
        shows_mode = name == "decode_mode"
        family = kind(f"{PREFIX}:{name}", meaning, labels=["model_name", "replica", *(["mode"] if shows_mode else [])])
        for load in loads:
            if (value := value_of(load)) is not None:
                family.add_metric([model_name, load.replica, *([load.mode] if shows_mode else [])], value)
        families.append(family)
    return text_of(families)


def text_of(families: Iterable[Metric]) -> str:
    """Text of metric families in Prometheus' format."""
    return generate_latest(_Given(families)).decode()


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _under_vllms_name(family: Metric) -> Metric:
    twin = Metric(f"{VLLM}{family.name.removeprefix(PREFIX)}", family.documentation, family.type)
    twin.samples = [sample._replace(name=f"{VLLM}{sample.name.removeprefix(PREFIX)}") for sample in family.samples]
    return twin
