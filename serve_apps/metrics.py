"""What has this ingress served so far, and what are its decoder replicas at, in Prometheus' words?

Counters are of one process, the ingress or a replica; rates and ratios are for who asks. Names follow vLLM's, with our
prefix.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from serve_apps.pieces import Tally
from serve_apps.replica_load import Load

__all__ = ["Counters", "gauges"]

PREFIX = "tidar"
MEANING = {
    "requests_total": "Completion requests answered, by HTTP status; a stream counts as what it began with.",
    "requests_ended_early_total": "Streams that broke off: by an error, or because the client hung up.",
    "prompt_tokens_total": "Tokens read.",
    "generation_tokens_total": "Tokens written.",
    "spec_decode_num_drafts_total": "Decode steps that verified a draft.",
    "spec_decode_num_draft_tokens_total": "Speculative tokens verified: K - 1 for each draft.",
    "spec_decode_num_accepted_tokens_total": "Speculative tokens that stood.",
}
OF_REPLICAS: dict[str, tuple[str, str, Callable[[Load], float | None]]] = {
    "num_requests_running": ("gauge", "Sequences that hold a row.", lambda load: load.running),
    "num_requests_waiting": ("gauge", "Sequences that wait for a row.", lambda load: load.waiting),
    "kv_cache_pages": ("gauge", "Pages of the KV cache.", lambda load: load.pages),
    "kv_cache_pages_used": ("gauge", "Pages that sequences hold.", lambda load: load.pages_held),
    "kv_cache_usage_perc": ("gauge", "Their share of all; 1 is full.", lambda load: load.pages_held / load.pages),
    "prefix_cache_hits_total": ("counter", "Prompt tokens found in the cache.", lambda load: load.shared_tokens),
    "num_preemptions_total": ("counter", "Sequences that gave up their pages.", lambda load: load.preemptions),
    "decode_mode": ("gauge", "1 for the mode that the planner has chosen.", lambda load: 1),
    "decode_expected_speedup": (
        "gauge",
        "Tokens per second that the chosen mode promises over the autoregressive one; absent where the mode is fixed.",
        lambda load: load.expected_over_ar,
    ),
}
"""Type, meaning and value of what each replica is asked."""


class Counters:
    """Totals since this process began."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._totals: Counter[tuple[str, str]] = Counter(
            {(name, ""): 0 for name in MEANING if name != "requests_total"}
        )

    def count_answer(self, status: int) -> None:
        """One request was answered."""
        self._totals["requests_total", f',status="{status}"'] += 1

    def count_break(self) -> None:
        """One stream ended before its text."""
        self._totals["requests_ended_early_total", ""] += 1

    def count_tokens(self, tally: Tally) -> None:
        """What one request has cost."""
        self._totals["prompt_tokens_total", ""] += tally.prompt_tokens
        self._totals["generation_tokens_total", ""] += tally.completion_tokens
        if (metrics := tally.metrics()) is not None:
            drafts = metrics.speculative_decoding
            self._totals["spec_decode_num_drafts_total", ""] += drafts.num_spec_steps
            self._totals["spec_decode_num_draft_tokens_total", ""] += drafts.num_draft_tokens
            self._totals["spec_decode_num_accepted_tokens_total", ""] += drafts.num_accepted_draft_tokens

    def exposition(self) -> str:
        """All totals in Prometheus' text format."""
        lines = []
        for name, meaning in MEANING.items():
            lines += [f"# HELP {PREFIX}:{name} {meaning}", f"# TYPE {PREFIX}:{name} counter"]
            for (counted, label), total in sorted(self._totals.items()):
                if counted == name:
                    lines.append(f'{PREFIX}:{name}{{model_name="{_escaped(self._model_name)}"{label}}} {total}')
        return "\n".join(lines) + "\n"


def gauges(model_name: str, loads: Sequence[Load]) -> str:
    """What the replicas are at, in Prometheus' text format."""
    lines = []
    for name, (kind, meaning, value_of) in OF_REPLICAS.items():
        lines += [f"# HELP {PREFIX}:{name} {meaning}", f"# TYPE {PREFIX}:{name} {kind}"]
        for load in loads:
            labels = f'model_name="{_escaped(model_name)}",replica="{load.replica}"'
            labels += f',mode="{load.mode}"' if name == "decode_mode" else ""
            if (value := value_of(load)) is not None:
                lines.append(f"{PREFIX}:{name}{{{labels}}} {value}")
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
