"""A report as JSON, as Markdown with tables, and as pictures.

Tasks have the paper's layout: texts as in table 2, with tokens per forward in parentheses; choices as in table 3.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.paper_tasks import PAPER_TASKS, TABLE_2, TABLE_3
from pipelines.evaluation.plots import acceptance_plot, quality_plot, speed_plot
from pipelines.evaluation.task_scores import PARENT
from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.provenance import made_by, write_made_by
from tidar_core.config import AUTOREGRESSIVE

__all__ = ["REPORT", "markdown", "report_metrics", "write_report"]

REPORT = "report.json"
NOT_RUN = "-"


def write_report(job: EvaluateJob, report: Mapping[str, Any]) -> None:
    """Write the report's folder to the job's output."""
    parents = {"bundle": report["bundle_hash"], "shards": report["shards"]}
    if report["parent"]:
        parents[PARENT] = report["parent"]["hash"]
    pictures = {
        "acceptance.png": acceptance_plot(
            report["acceptance_histogram"], report["acceptance_by_position"], report["draft_accuracy"]
        ),
        "speed.png": speed_plot(report["modes"]),
    }
    if drawn := [row for row in report["tasks"] if _drawn(row)]:
        pictures["quality.png"] = quality_plot(drawn)
    with output_folder.staged_folder(job.output, REPORT) as folder:
        write_made_by(folder, made_by(job.model_dump(mode="json"), parents))
        for name, picture in pictures.items():
            locations.write_bytes(locations.join(folder, name), picture)
        locations.write_bytes(locations.join(folder, "report.md"), markdown(report, sorted(pictures)).encode())
        locations.write_bytes(locations.join(folder, REPORT), json.dumps(report, indent=2).encode())


def markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report in Markdown, with `pictures` at its end."""
    parent = report["parent"]
    return (
        "\n\n".join(
            [
                f"# Report on {report['bundle']}",
                f"Bundle hash `{report['bundle_hash']}`, block length {report['block_len']}.",
                *([_of_parent(parent)] if parent else []),
                *([_of_service(service)] if (service := report.get("service")) else []),
                _table(("held-out measure", "value", *(["parent"] if parent else [])), _measures(report)),
                _table(
                    ("mode", "tokens/s (spread)", "tokens per forward", "tokens per round", "first token, ms", "as AR"),
                    _modes(report["modes"]),
                ),
                *_tasks(report["tasks"]),
                "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
            ]
        )
        + "\n"
    )


def report_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report by metric name, for a tracking server."""
    names = ("ar_loss", "diffusion_loss", "tokens_per_forward", "tokens_per_round", "speed_over_ar", "prompts_equal")
    metrics = {name: float(report[name]) for name in names if report[name] is not None}
    metrics |= {f"tokens_per_second/{name}": mode["tokens_per_second"] for name, mode in report["modes"].items()}
    if report["parent"] and report["parent"]["ar_loss"] is not None:
        metrics["parent/ar_loss"] = report["parent"]["ar_loss"]
    for entry in report["tasks"]:
        for name, figures in {**entry["modes"], PARENT: entry["parent"]}.items():
            for figure in ("score", "tokens_per_forward"):
                if figures and figures[figure] is not None:
                    metrics[f"{entry['task']}/{name}/{figure}"] = figures[figure]
    return metrics


def _of_parent(parent: Mapping[str, Any]) -> str:
    link = "which it was trained from" if parent["is_start"] else "which its lineage does not name"
    identity = "" if parent["hash"] == parent["location"] else f" (`{parent['hash'][:12]}`)"
    return f"Compared with the AR checkpoint {parent['location']}{identity}, {link}."


def _of_service(service: Mapping[str, Any]) -> str:
    return f"Tasks were sent over HTTP to {service['address']} as {service['id']}, which decodes {service['mode']}."


def _measures(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    parent = report["parent"]

    def entry(name: str, value: str, of_parent: str = "") -> tuple[str, ...]:
        return (name, value, of_parent) if parent else (name, value)

    yield entry(
        f"AR loss (nats per token, {report['held_out_rows']} rows)",
        _number(report["ar_loss"], 4),
        _number(parent["ar_loss"], 4) if parent else "",
    )
    yield entry("diffusion loss (nats per token)", _number(report["diffusion_loss"], 4))
    if shortened := report["prompts_shortened"]:
        yield entry("prompts without their beginning, for the context", f"{shortened} of {report['prompts']}")
    yield entry(
        "greedy texts equal to the plain AR loop",
        f"{report['prompts_equal']} of {report['prompts']} prompts",
        f"equal on {parent['prompts_equal']}, logits on {parent['logits_equal']}" if parent else "",
    )
    mode = "single-pass" if "single-pass" in report["modes"] else AUTOREGRESSIVE
    yield entry(f"tokens per forward (greedy, {mode})", _number(report["tokens_per_forward"], 2), "1.00")
    speed = f"speed over the AR mode ({report['batch']} at a time, {report['threads']} threads)"
    ar = report["modes"]["autoregressive"]["tokens_per_second"]
    yield entry(speed, f"{report['speed_over_ar']:.2f}", f"{parent['tokens_per_second'] / ar:.2f}" if parent else "")


def _modes(modes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, mode in modes.items():
        low, high = mode["tokens_per_second_spread"]
        yield (
            name,
            f"{mode['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})",
            f"{mode['tokens_per_forward']:.2f}",
            f"{mode['tokens_per_round']:.2f}",
            f"{1000 * mode['time_to_first_token_seconds']:.1f}",
            "yes" if mode["equal_to_ar"] else "NO",
        )


def _tasks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    by_name = {row["task"]: row for row in rows}
    for heading, names in (
        ("Quality, tokens per forward in parentheses (TiDAR, table 2)", TABLE_2),
        ("Likelihood (TiDAR, table 3)", TABLE_3),
        ("Tasks of our own", [name for name in by_name if name not in PAPER_TASKS]),
    ):
        if names := [*names] if by_name.keys() & set(names) else []:
            titles = [PAPER_TASKS[name].title if name in PAPER_TASKS else name for name in names]
            yield f"## {heading}"
            yield _table(("model", *titles, "avg"), _standings([by_name.get(name) for name in names]))
    yield "## How the tasks were run"
    yield _table(
        ("task", "metric", "shots", "questions", "standard error", "modes agree", "as the parent", "programs ran in"),
        (
            (
                row["title"],
                row["metric"],
                str(row["shots"]),
                str(row["documents"]),
                f"{100 * next(iter(row['modes'].values()))['stderr']:.2f}",
                "yes" if row["modes_say_the_same"] else "NO",
                f"{row['equal_to_parent']} of {row['texts']} texts" if row["parent"] and row["texts"] else NOT_RUN,
                row["isolation"] or NOT_RUN,
            )
            for row in rows
        ),
    )


def _standings(rows: Sequence[Mapping[str, Any] | None]) -> Iterator[tuple[str, ...]]:
    """A line for the parent and for each mode: scores in per cent, and their mean over the tasks that were run."""
    run = [row for row in rows if row]
    for name in dict.fromkeys([PARENT, *(mode for row in run for mode in row["modes"])]):
        found = [_figures(row, name) for row in rows]
        had = [figures for figures in found if figures]
        if not had:
            continue
        speeds = [figures["tokens_per_forward"] for figures in had if figures["tokens_per_forward"]]
        mean = {
            "score": sum(figures["score"] for figures in had) / len(had),
            "tokens_per_forward": sum(speeds) / len(speeds) if speeds else None,
        }
        title = "parent (AR)" if name == PARENT else name
        yield (title, *(_cell(figures, of_parent=name == PARENT) for figures in (*found, mean)))


def _figures(row: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    return None if row is None else row["parent"] if name == PARENT else row["modes"].get(name)


def _cell(figures: Mapping[str, Any] | None, *, of_parent: bool) -> str:
    if figures is None:
        return NOT_RUN
    per_forward = figures["tokens_per_forward"]
    return f"{100 * figures['score']:.2f}" + (f" ({per_forward:.2f})" if per_forward and not of_parent else "")


def _number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _drawn(row: Mapping[str, Any]) -> bool:
    return any(mode["tokens_per_forward"] for mode in row["modes"].values())


def _table(heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
