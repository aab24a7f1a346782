"""What has this ingress served so far, in Prometheus' words?

Counters only, of this process; rates and ratios are for who asks. Names follow vLLM's, with our prefix.
"""

from collections import Counter

from serve_apps.events import Tally

__all__ = ["Counters"]

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
        escaped = self._model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = []
        for name, meaning in MEANING.items():
            lines += [f"# HELP {PREFIX}:{name} {meaning}", f"# TYPE {PREFIX}:{name} counter"]
            for (counted, label), total in sorted(self._totals.items()):
                if counted == name:
                    lines.append(f'{PREFIX}:{name}{{model_name="{escaped}"{label}}} {total}')
        return "\n".join(lines) + "\n"
