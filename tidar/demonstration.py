"""The command that shows the whole pipeline on one machine."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidar.options import THREADS, Json
from tidar.output import note, print_facts

if TYPE_CHECKING:
    from serve_apps.settings import ServeSettings

__all__ = ["quickstart"]

DRAFTS_SECONDS, SCRATCH_SECONDS = 120, 480
"""Training time by default."""
TIMING_SECONDS, TIMING_SHARE = 6.0, 0.1
"""Time for which the service times its decode steps, and the most of it in shares of the training time."""


def quickstart(
    workdir: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("workdir"),
    budget_seconds: Annotated[
        int | None,
        typer.Option(min=1, help=f"Training time; {DRAFTS_SECONDS} by default, {SCRATCH_SECONDS} with --from-scratch."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the service, on 127.0.0.1.")] = 8000,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train a tiny model from random weights, instead of drafts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline from a checkpoint to served answers on this machine, with no input."""
    from serve_apps.app import check_place, shutdown
    from serve_apps.settings import ServeSettings

    began = time.perf_counter()
    model = f"models:/{_name()}@champion"
    seconds = budget_seconds or (SCRATCH_SECONDS if from_scratch else DRAFTS_SECONDS)
    timing = min(TIMING_SECONDS, seconds * TIMING_SHARE)
    settings = ServeSettings(model=model, port=port, num_cpus=1, threads=THREADS, timing_seconds=timing)
    check_place(settings)
    try:
        facts, tracking_uri = (_scratch if from_scratch else _drafts)(workdir, seconds, settings, as_json)
    finally:
        shutdown()
    print_facts(facts | {"elapsed_seconds": time.perf_counter() - began}, as_json)
    dtype = facts.get("precision_of_speeds", "fp32")
    serve_again = f"{sys.executable} -m tidar serve {model} --dtype {dtype} --tracking-uri {tracking_uri}"
    route = "completions"
    request: dict[str, Any] = {"prompt": "def main("}
    if not from_scratch:
        route, request = "chat/completions", {"messages": [{"role": "user", "content": "List three fruits."}]}
    body = json.dumps({"model": _name()} | request)
    note(f"Serve it again: {serve_again}\nSend a request: curl http://127.0.0.1:{port}/v1/{route} -d '{body}'")


def _drafts(workdir: Path, seconds: int, settings: "ServeSettings", as_json: bool) -> tuple[dict[str, Any], str]:
    """Facts of the quickstart with a real checkpoint, and the address of its registry."""
    from pipelines.cluster.console import stderr
    from pipelines.quickstart.drafts import QUESTIONS, flow
    from serve_apps.tools.smoke_client import chat_over_http

    result = flow(workdir, seconds)
    stderr.print("[bold]8 serve[/] the champion and send three questions over HTTP, with drafts and without")
    served = {"tracking_uri": result.tracking_uri, "dtype": result.summary["precision_of_speeds"]}
    settings = settings.model_copy(update=served)
    answered = chat_over_http(settings, QUESTIONS, max_tokens=96)
    if as_json:
        return result.summary | {"answers": [asdict(one) for one in answered]}, result.tracking_uri
    for one in answered:
        drafted, plain = one.tokens / one.seconds, one.tokens / one.seconds_plain
        verdict = "the same text" if one.equal else "another text"
        print(f"\n> {one.question}\n{one.answer}")
        print(f"  [{one.tokens} tokens; {drafted:.0f} tokens/s with drafts; {plain:.0f} without, {verdict}]")
    print()
    return result.summary, result.tracking_uri


def _scratch(workdir: Path, seconds: int, settings: "ServeSettings", as_json: bool) -> tuple[dict[str, Any], str]:
    """Facts of the quickstart from random weights, and the address of its registry."""
    from pipelines.cluster.console import stderr
    from pipelines.quickstart.from_scratch import PROMPTS, flow
    from serve_apps.tools.smoke_client import completions_over_http

    result = flow(workdir, seconds)
    stderr.print("[bold]6 serve[/] the champion and complete three prompts over HTTP")
    settings = settings.model_copy(update={"tracking_uri": result.tracking_uri})
    completions = completions_over_http(settings, PROMPTS, max_tokens=48)
    return result.summary | {"completions": completions}, result.tracking_uri


def _name() -> str:
    from pipelines.quickstart.site import MODEL_NAME

    return MODEL_NAME
