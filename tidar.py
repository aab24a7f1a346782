"""Command line: one command per stage of the pipeline.

    tidar quickstart                     the whole pipeline on this machine
    tidar pack | train | evaluate | publish JOB.yaml
    tidar models [NAME]                  registered versions
    tidar promote NAME VERSION           and rollback NAME
    tidar generate | bench | profile | serve MODEL

MODEL is a bundle's folder or URI, or models:/NAME@ALIAS. With --json, standard output holds one JSON object and nothing
else; progress goes to standard error. Exit codes: 0 done, 2 wrong input (one line names the fault), 1 anything else.
"""

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from tidar_core.artifacts.network.loopback import exempt_loopback
from tidar_core.errors import RequestError, TidarError, UserError

app = typer.Typer(
    help="Train, evaluate and serve TiDAR models: think in diffusion, talk in autoregression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file; see infra/jobs.")]
Model = Annotated[str, typer.Argument(help="Bundle folder or URI, or models:/NAME@ALIAS.")]
Tracking = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server or SQLite file.")]
THREADS = max(1, (os.cpu_count() or 1) - 1)
"""CPU threads by default. A service's proxy and ingress need a core, and a decode step waits for a thread that shares
its core. All commands have this default, because `tidar serve` looks for a latency table of as many threads."""
Threads = Annotated[int, typer.Option(min=1, help="CPU threads; all cores but one by default.")]
BlockLen = Annotated[int | None, typer.Option(min=1, help="Draft block; by default that of the training.")]
TRACKING = "sqlite:///mlflow.db"


class DType(StrEnum):
    """Type of weights and arithmetic; only in fp32 are texts compared exactly."""

    fp32 = "fp32"
    bf16 = "bf16"


Dtype = Annotated[DType, typer.Option(help="Type of weights and arithmetic.")]


class Mode(StrEnum):
    """How a model decodes; `auto` measures this machine first, then picks the fastest for each step."""

    auto = "auto"
    single_pass = "single-pass"
    two_pass = "two-pass"
    autoregressive = "autoregressive"


def main() -> None:
    """Run the command line; wrong input ends in one line and exit code 2, never in a traceback."""
    exempt_loopback()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TidarError as error:
        _exit(str(error), 2 if isinstance(error, UserError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        _exit("stopped", 1)
    except OSError as error:  # e.g. a full disk or a folder without rights, anywhere
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _exit(f"{where}{os.strerror(error.errno)}; check the path, its rights and the room there", 1)
    except TyperException as error:  # an unknown option, a value out of range
        _exit(error.format_message() or "see tidar --help", 2)


@app.command()
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
    _print(result.summary | {"completions": completions, "elapsed_seconds": seconds}, as_json)
    serve_again = f"{sys.executable} -m tidar serve {model} --tracking-uri {result.tracking_uri}"
    body = json.dumps({"model": MODEL_NAME, "prompt": "def main("})
    _note(f"Serve it again: {serve_again}\nSend a request: curl http://127.0.0.1:{port}/v1/completions -d '{body}'")


@app.command()
def pack(job: JobFile, as_json: Json = False) -> None:
    """Tokenize and pack a corpus into shards."""
    from pipelines.jobs import PackJob, read_job
    from pipelines.packing import pack as stage

    manifest = stage.pack(read_job(PackJob, job))
    splits = {
        name: {"documents": s.documents, "tokens": s.tokens, "rows": s.rows} for name, s in manifest.splits.items()
    }
    _print(
        {"row_len": manifest.row_len, "vocab_len": manifest.vocab_len, "identity": manifest.identity} | splits, as_json
    )


@app.command()
def train(
    job: JobFile,
    dry_run: Annotated[bool, typer.Option(help="Print what it would do, and whether it can.")] = False,
    as_json: Json = False,
) -> None:
    """Train on packed shards, or continue a stopped run; ends with a bundle."""
    from pipelines.jobs import TrainJob, read_job

    parsed = read_job(TrainJob, job)
    if dry_run:
        from pipelines.training.dry_run import dry_run as dry_run_facts

        return _print(dry_run_facts(parsed), as_json)
    from pipelines.training import train as stage

    info = stage.train(parsed)
    return _print({"bundle": parsed.output, "bundle_hash": info.bundle_hash, "block_len": info.block_len}, as_json)


@app.command()
def evaluate(job: JobFile, as_json: Json = False) -> None:
    """Measure a bundle on held-out rows and prompts; ends with a report."""
    from pipelines.evaluation import evaluate as stage
    from pipelines.jobs import EvaluateJob, read_job

    _print(stage.evaluate(read_job(EvaluateJob, job)), as_json)


@app.command()
def publish(job: JobFile, as_json: Json = False) -> None:
    """Register a bundle whose report meets every bar; it becomes the challenger."""
    from pipelines.evaluation import publish as stage
    from pipelines.jobs import PublishJob, read_job

    parsed = read_job(PublishJob, job)
    _print({"name": parsed.name, "registry_version": stage.publish(parsed), "alias": "challenger"}, as_json)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One model; all by default.")] = None,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """List registered versions: status, hash, gates."""
    from dataclasses import asdict

    from pipelines.evaluation.tables import print_models
    from tidar_core.artifacts.registry import model_registry

    listed = model_registry.list_versions(model_registry.absolute_tracking_uri(tracking_uri), name)
    _print({"models": [asdict(version) for version in listed]}, as_json, print_models)


@app.command()
def promote(name: str, version: int, tracking_uri: Tracking = TRACKING, as_json: Json = False) -> None:
    """Make a version the champion; the champion before it is recorded for rollback."""
    from tidar_core.artifacts.registry import model_registry

    champion = model_registry.promote(model_registry.absolute_tracking_uri(tracking_uri), name, version)
    _print({"name": name, "registry_version": champion, "alias": "champion"}, as_json)


@app.command()
def rollback(name: str, tracking_uri: Tracking = TRACKING, as_json: Json = False) -> None:
    """Make the previous champion the champion again."""
    from tidar_core.artifacts.registry import model_registry

    version = model_registry.rollback(model_registry.absolute_tracking_uri(tracking_uri), name)
    _print({"name": name, "registry_version": version, "alias": "champion"}, as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    mode: Annotated[
        Mode, typer.Option(help="Modes differ in speed, not in the distribution of texts.")
    ] = Mode.single_pass,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Annotated[list[str], typer.Option(help="End before this text; may be given several times.")] = [],  # noqa: B006
    fields: Annotated[str, typer.Option(help="JSON object of any other field of POST /v1/completions.")] = "{}",
    block_len: BlockLen = None,
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Continue a prompt; text appears as it is committed."""
    from serve_apps.tools.offline_generation import OfflineGeneration

    request = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
               "stop": stop, **_object(fields, "--fields"), "prompt": prompt}  # fmt: skip
    uri = _bundle_uri(model, tracking_uri)
    output = OfflineGeneration(_load(uri, threads), uri, request, mode=mode.value, block_len=block_len, report=_note)
    for text in output.deltas():
        if not as_json:
            print(text, end="", flush=True)
    facts = output.figures()
    if as_json:
        return _print(facts, as_json)
    print()
    tokens, per_forward = len(facts["token_ids"]), facts["tokens_per_forward"]
    return _note(f"{tokens} tokens, {per_forward:.2f} per forward, {facts['seconds']:.2f} s")


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Bundle folder or URI, or models:/NAME@ALIAS.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with prompt, question, turns or text.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 8,
    max_tokens: int = 64,
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts decoded together.")] = [1],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    block_len: BlockLen = None,
    dtype: Dtype = DType.fp32,
    plot: Annotated[Path | None, typer.Option(help="Write speeds and acceptance to this PNG file.")] = None,
    transformers: Annotated[bool, typer.Option(help="Time transformers' generate on the same prompts too.")] = False,
    shape: Annotated[str | None, typer.Option(help="Time decode steps of a published shape, no model.")] = None,
    random_weights: Annotated[bool, typer.Option(help="Needed with --shape, which has no trained weights.")] = False,
    context: Annotated[list[int], typer.Option(min=1, help="With --shape: tokens in the cache; 512.")] = [],  # noqa: B006
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Compare the modes on the same prompts in one run: speed, tokens per forward, acceptance, equality."""
    from pipelines.evaluation import measure, tables
    from tidar_core.config import SamplingConfig

    if (model is None) == (shape is None) or random_weights != (shape is not None):
        raise RequestError("bench takes a MODEL, or --shape NAME with --random-weights; give one of them")
    if shape is not None:
        facts = measure.shape_costs(
            shape, block_len=block_len or 16, batches=batch, contexts=context or [512], dtype=dtype.value
        )
        _print(facts, as_json, tables.print_steps)
        return
    if len(batch) > 1 or context:
        raise RequestError("several --batch, or --context, need a --shape; give a MODEL one --batch")
    uri = _bundle_uri(str(model), tracking_uri)
    bundle = _load(uri, threads, dtype.value)
    sampling = SamplingConfig(max_tokens=max_tokens, eos_ids=bundle.end_ids)
    tokens = measure.bench_prompts(bundle, prompts, count, max_tokens)
    facts = measure.compared_modes(
        bundle.model, tokens, sampling, block_len=block_len or bundle.info.block_len, batch=batch[0], repeats=repeats,
        uri=uri,
    )  # fmt: skip
    if transformers:
        from pipelines.evaluation.transformers_baseline import generate_speed

        facts["transformers"] = generate_speed(bundle.model, tokens, max_tokens=max_tokens, repeats=repeats)
    if plot is not None:
        from pipelines.evaluation.plots import bench_plot

        plot.write_bytes(bench_plot(facts["modes"]))
    _print(facts, as_json, tables.print_modes)


@app.command()
def profile(
    model: Model,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of sequences timed together.")] = 4,
    dtype: Dtype = DType.fp32,
    plot: Annotated[Path | None, typer.Option(help="Write the curve to this PNG file.")] = None,
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Time forwards of 1 to 512 query tokens: how many token slots are free on this machine."""
    from pipelines.evaluation import measure, tables

    uri = _bundle_uri(model, tracking_uri)
    bundle = _load(uri, threads, dtype.value)
    facts = measure.latency_curve(bundle.model, batch=batch)
    facts["stored"] = measure.stored_latency(uri, bundle, batch=batch)
    if plot is not None:
        from pipelines.evaluation.plots import latency_plot

        plot.write_bytes(latency_plot(facts["points"]))
    _print(facts, as_json, tables.print_latency)


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Bundle folder or URI, or models:/NAME@ALIAS.")] = None,
    settings: Annotated[Path | None, typer.Option(help="YAML file of settings; other options override it.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 by default.")] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 by default.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences that a replica decodes together; 8.")] = None,
    context_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and completion together.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="auto by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores but one.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help=TRACKING)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print a replica's memory; start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a model on this machine over HTTP, with OpenAI's API; Ctrl-C ends it."""
    from serve_apps.deployment import command_settings

    if as_json and not dry_run:
        raise RequestError("--json prints the facts of --dry-run; give both, or neither")
    merged = command_settings(
        settings,
        defaults={"mode": Mode.auto.value, "threads": THREADS, "tracking_uri": TRACKING},
        given={"model": model, "port": port, "host": host, "rows": rows, "context_len": context_len,
               "mode": None if mode is None else mode.value, "threads": threads, "tracking_uri": tracking_uri},
    )  # fmt: skip
    if dry_run:
        from pipelines.evaluation.tables import print_memory
        from serve_apps.replica.replica_memory import memory_facts

        return _print(memory_facts(merged), as_json, print_memory)

    from serve_apps.app import run

    return run(merged)


def _bundle_uri(model: str, tracking_uri: str) -> str:
    """Find the address of the bundle that MODEL names."""
    from tidar_core.artifacts.registry import model_registry

    return model_registry.find_bundle(model_registry.absolute_tracking_uri(tracking_uri), model).uri


def _load(uri: str, threads: int, dtype: str = "fp32") -> Any:
    """Load a verified bundle, on the GPU if there is one."""
    from pipelines.evaluation.measure import loaded_bundle

    return loaded_bundle(uri, threads, dtype)


def _object(text: str, option: str) -> dict[str, Any]:
    """Parse a JSON object given on the command line."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"{option} is {text}; it must be a JSON object such as '{{\"min_p\": 0.1}}'")
    return value


def _print(values: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Print a JSON object, or text for a person: by `show`, or as plain names and values."""
    if as_json:
        print(json.dumps(values))
        return
    from pipelines.evaluation.tables import print_values

    (show or print_values)(values)


def _exit(message: str, code: int) -> NoReturn:
    """Print one line and exit."""
    _note(f"tidar: {' '.join(message.split())}")
    sys.exit(code)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
