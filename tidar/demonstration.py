"""The command that shows the whole pipeline on one machine."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tidar.options import THREADS, Json
from tidar.output import note, print_facts

__all__ = ["quickstart"]


def quickstart(
    workdir: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("workdir"),
    budget_seconds: Annotated[int, typer.Option(help="Training time, both phases together.")] = 480,
    port: Annotated[int, typer.Option(help="Port of the service, on 127.0.0.1.")] = 8000,
    as_json: Json = False,
) -> None:
    """Run the pipeline from corpus to served completion on this machine, with no input."""
    import time

    from pipelines.cluster.console import stderr
    from pipelines.quickstart import MODEL_NAME, PROMPTS, flow
    from serve_apps.app import check_place, shutdown
    from serve_apps.settings import ServeSettings
    from serve_apps.tools.smoke_client import completions_over_http

    began = time.perf_counter()
    model = f"models:/{MODEL_NAME}@champion"
    settings = ServeSettings(model=model, port=port, num_cpus=1, threads=THREADS)
    check_place(settings)
    try:
        result = flow(workdir, budget_seconds)
        stderr.print("[bold]6 serve[/] the champion and complete three prompts over HTTP")
        settings = settings.model_copy(update={"tracking_uri": result.tracking_uri})
        completions = completions_over_http(settings, PROMPTS, max_tokens=48)
    finally:
        shutdown()
    seconds = time.perf_counter() - began
    print_facts(result.summary | {"completions": completions, "elapsed_seconds": seconds}, as_json)
    serve_again = f"{sys.executable} -m tidar serve {model} --tracking-uri {result.tracking_uri}"
    body = json.dumps({"model": MODEL_NAME, "prompt": "def main("})
    note(f"Serve it again: {serve_again}\nSend a request: curl http://127.0.0.1:{port}/v1/completions -d '{body}'")
