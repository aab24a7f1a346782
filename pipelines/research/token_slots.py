"""Cost of a forward of one model, by the number of tokens in it.

    python -m pipelines.research.experiments infra/experiments/token-slots.yaml

The free-token-slot curve (TiDAR, figure 1) as an experiment: results.json, table.md and plot.png. It has clean
tokens and no drafts; a planner uses the table of whole decode steps that `tidar profile` measures.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from pipelines.cluster.progress import job_progress
from pipelines.evaluation.plots import latency_plot
from pipelines.jobs import Job
from tidar_core.artifacts.model.bundle import DTYPES, load_bundle
from tidar_core.planning.latency_table import measure_latency

__all__ = ["TokenSlotsJob", "token_slots"]

Positive = Annotated[int, Field(ge=1)]


class TokenSlotsJob(Job):
    """Job: a bundle -> the time of its forwards."""

    title: str
    init_from: str
    """Bundle that is timed."""
    output: str
    token_slots: tuple[Positive, ...] = Field(min_length=1)
    """Tokens of one sequence in a forward; the others are compared with the first."""
    batches: tuple[Positive, ...] = (1,)
    contexts: tuple[Positive, ...] = (256,)
    """Tokens in the cache."""
    repeats: Positive = 9
    threads: Positive = 1
    device: str = "cpu"
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")] = "fp32"


def token_slots(job: TokenSlotsJob) -> str:
    """Time the forwards, write results and plot; returns the table in Markdown."""
    torch.set_num_threads(job.threads)
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    model = load_bundle(job.init_from, dtype=DTYPES[job.dtype], device=job.device).model
    total = len(job.token_slots) * len(job.batches) * len(job.contexts)
    with job_progress(job.title, total=total, unit="shapes") as show:
        done = iter(range(1, total + 1))
        measured = measure_latency(
            model, rows=job.token_slots, batches=job.batches, contexts=job.contexts, repeats=job.repeats,
            budget=math.inf, on_point=lambda: show(next(done), {}),
        )  # fmt: skip
    points = [asdict(point) for point in measured.points]
    (output / "results.json").write_text(json.dumps(points, indent=2) + "\n")
    (output / "table.md").write_text(_table(points))
    (output / "plot.png").write_bytes(latency_plot(points))
    return _table(points)


def _table(points: Sequence[dict[str, Any]]) -> str:
    """A line for each batch and context: milliseconds by tokens in a forward."""
    slots = list(dict.fromkeys(point["rows"] for point in points))
    lines = [
        f"| batch, context | {' | '.join(map(str, slots))} |",
        f"|---|{'---|' * len(slots)}",
    ]
    for batch, context in dict.fromkeys((point["batch"], point["context"]) for point in points):
        times = [p["seconds"] for p in points if (p["batch"], p["context"]) == (batch, context)]
        lines.append(f"| {batch}, {context} | {' | '.join(f'{1000 * seconds:.2f}' for seconds in times)} |")
    return "\n".join(lines) + "\n"
