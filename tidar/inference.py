"""Commands that decode with a model: completions, measurements, the service."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tidar.fields import request_fields
from tidar.options import (
    MODEL,
    MOST_TOGETHER,
    THREADS,
    TRACKING,
    BlockLen,
    DType,
    Dtype,
    Json,
    Mode,
    Model,
    Threads,
    Tracking,
    Weights,
)
from tidar.output import note, print_facts
from tidar_core.errors import RequestError

__all__ = ["bench", "generate", "profile", "serve"]


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    mode: Annotated[
        Mode | None,
        typer.Option(help="single-pass by default. Modes differ in speed, not in the distribution of texts."),
    ] = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Annotated[list[str], typer.Option(help="End before this text; may be given several times.")] = [],  # noqa: B006
    fields: Annotated[str, typer.Option(help="JSON object of any other field of POST /v1/completions.")] = "{}",
    block_len: BlockLen = None,
    weights: Weights = None,
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Continue a prompt; text appears as it is committed."""
    from serve_apps.tools.offline_generation import OfflineGeneration

    request = request_fields(context, as_json=as_json)
    uri = _bundle_uri(model, tracking_uri)
    bundle = _load(uri, threads, weights=weights)
    output = OfflineGeneration(bundle, uri, request, mode=mode and mode.value, block_len=block_len, report=note)
    for text in output.deltas():
        if not as_json:
            print(text, end="", flush=True)
    facts = output.figures()
    if as_json:
        print_facts(facts, as_json)
    else:
        print()
        tokens, per_forward = len(facts["token_ids"]), facts["tokens_per_forward"]
        note(f"{tokens} tokens, {per_forward:.2f} per forward, {facts['seconds']:.2f} s")
    _note_without_drafts(bundle, uri)


def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with prompt, question, turns or text.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Prompts taken from the file; 8.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Prompts of the file are a user's messages; default: if there is a template."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="64 by default.")] = None,
    batch: Annotated[list[int], typer.Option(min=1, max=MOST_TOGETHER, help="Prompts decoded together; 1.")] = [],  # noqa: B006
    repeats: Annotated[int | None, typer.Option(min=1, help="3 by default; 5 of decode steps.")] = None,
    block_len: BlockLen = None,
    dtype: Dtype = DType.fp32,
    weights: Weights = None,
    plot: Annotated[Path | None, typer.Option(help="Write speeds and acceptance to this PNG file.")] = None,
    transformers: Annotated[bool, typer.Option(help="Time transformers on the same prompts too.")] = False,
    llama_cpp: Annotated[Path | None, typer.Option(help="Time llama.cpp with this GGUF file too.")] = None,
    every_plan: Annotated[bool, typer.Option(help="Compare auto with every fixed plan instead.")] = False,
    prompt_len: Annotated[
        list[int],
        typer.Option(min=1, help="Time prompts of so many random tokens, and steps behind and beside them."),
    ] = [],  # noqa: B006
    shape: Annotated[str | None, typer.Option(help="Time decode steps of a published shape, no model.")] = None,
    random_weights: Annotated[bool, typer.Option(help="Needed with --shape, which has no trained weights.")] = False,
    context: Annotated[list[int], typer.Option(min=1, help="With --shape: tokens in the cache; 512.")] = [],  # noqa: B006
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Compare the modes on the same prompts in one run: speed, tokens per forward, acceptance, equality."""
    from pipelines.evaluation import measure, tables

    given = {"--prompts": prompts, "--count": count, "--chat": chat, "--max-tokens": max_tokens, "--batch": batch,
             "--block-len": block_len, "--plot": plot, "--transformers": transformers, "--llama-cpp": llama_cpp,
             "--context": context, "--every-plan": every_plan}  # fmt: skip
    _check_bench(given, model, shape, batch, random_weights, prompt_len)
    if shape is not None:
        form = shape, dtype.value, weights and weights.value, threads
        if prompt_len:
            random = measure.random_shape(*form, prompt_len)
            facts = measure.long_prompts(random, prompt_len, repeats=repeats or 3, shape=shape)
            return print_facts(facts, as_json, tables.print_prompts)
        sizes = {"batches": batch or [1], "contexts": context or [512], "repeats": repeats or 5}
        facts = measure.shape_costs(*form, block_len=block_len or 16, **sizes)
        return print_facts(facts, as_json, tables.print_steps)
    uri = _bundle_uri(str(model), tracking_uri)
    bundle = _load(uri, threads, dtype.value, weights)
    if prompt_len:
        of = uri if transformers else None
        facts = measure.long_prompts(bundle.model, prompt_len, repeats=repeats or 3, transformers_of=of)
        return print_facts(facts, as_json, tables.print_prompts)
    most = 64 if max_tokens is None else max_tokens
    requests = _bench_prompts(uri, bundle, prompts, most, chat, count=count, batch=batch)
    beside: dict[str, Any] = {"transformers": transformers, "llama_cpp": llama_cpp, "plot": plot}
    facts = (measure.compared_plans if every_plan else partial(measure.compared_modes, **beside))(
        bundle.model, requests, max_tokens=most, block_len=block_len or bundle.info.block_len,
        batch=batch[0] if batch else 1, repeats=repeats or 3, uri=uri,
    )  # fmt: skip
    print_facts(facts, as_json, tables.print_plans if every_plan else tables.print_modes)
    return _note_without_drafts(bundle, uri)


def profile(
    model: Model,
    batch: Annotated[
        int, typer.Option(min=1, max=MOST_TOGETHER, help="Largest number of sequences timed together.")
    ] = 4,
    dtype: Dtype = DType.fp32,
    weights: Weights = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curve to this PNG file.")] = None,
    threads: Threads = THREADS,
    tracking_uri: Tracking = TRACKING,
    as_json: Json = False,
) -> None:
    """Time forwards of 1 to 512 query tokens: how many token slots are free on this machine."""
    from pipelines.evaluation import measure, tables

    _check_plot(plot)
    uri = _bundle_uri(model, tracking_uri)
    bundle = _load(uri, threads, dtype.value, weights)
    facts = measure.latency_curve(bundle.model, batch=batch)
    facts["stored"] = measure.stored_latency(uri, bundle, batch=batch)
    if plot is not None:
        from pipelines.evaluation.plots import latency_plot
        from tidar_core.artifacts.store import locations

        locations.write_bytes(str(plot), latency_plot(facts["points"]))
    print_facts(facts, as_json, tables.print_latency)
    _note_without_drafts(bundle, uri)


def serve(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    settings: Annotated[Path | None, typer.Option(help="YAML file of settings; other options override it.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 by default.")] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 by default.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences that a replica decodes together; 8.")] = None,
    context_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and completion together.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="auto by default.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Type of weights and arithmetic; fp32 by default.")] = None,
    weights: Weights = None,
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
        defaults={"threads": THREADS, "tracking_uri": TRACKING},
        given={"model": model, "port": port, "host": host, "rows": rows, "context_len": context_len,
               "mode": None if mode is None else mode.value, "dtype": None if dtype is None else dtype.value,
               "weights": None if weights is None else weights.value, "threads": threads, "tracking_uri": tracking_uri},
    )  # fmt: skip
    if dry_run:
        from pipelines.evaluation.tables import print_memory
        from serve_apps.replica.replica_memory import memory_facts

        return print_facts(memory_facts(merged), as_json, print_memory)

    from serve_apps.app import run

    return run(merged)


def _bundle_uri(model: str, tracking_uri: str) -> str:
    """Find the address of the bundle or the checkpoint that MODEL names."""
    from tidar_core.artifacts.registry import model_registry

    return model_registry.find_bundle(model_registry.absolute_tracking_uri(tracking_uri), model).uri


def _load(uri: str, threads: int, dtype: str = "fp32", weights: str | None = None) -> Any:
    """Load a verified bundle or a checkpoint, on the GPU if there is one."""
    from pipelines.evaluation.measure import loaded_bundle

    return loaded_bundle(uri, threads, dtype, weights and str(weights))


def _check_bench(
    options: dict[str, Any],
    model: str | None,
    shape: str | None,
    batch: list[int],
    random_weights: bool,
    prompt_len: list[int],
) -> None:
    """Raise RequestError if a bench lacks something, or was given an option that it would ignore.

    options  values by name, without the options that every bench takes
    """
    _check_plot(options["--plot"])
    given = {name for name, value in options.items() if value not in (None, False, [])}
    if (model is None) == (shape is None) or random_weights != (shape is not None):
        raise RequestError("bench takes a MODEL, or --shape NAME with --random-weights; give one of them")
    if prompt_len:
        form, taken = "--prompt-len", set() if model is None else {"--transformers"}
    elif shape is not None:
        form, taken = "--shape", {"--batch", "--block-len", "--context"}
    elif len(batch) > 1 or "--context" in given:
        raise RequestError("several --batch, or --context, need a --shape; give a MODEL one --batch")
    elif "--every-plan" in given:
        form, taken = "--every-plan", given - {"--plot", "--transformers", "--llama-cpp"}
    else:
        return
    if others := sorted(given - taken):
        raise RequestError(f"bench with {form} does not take {' or '.join(others)}; drop {others[0]}")


def _bench_prompts(
    uri: str, bundle: Any, path: Path | None, max_tokens: int, chat: bool | None, *, count: int | None, batch: list[int]
) -> Any:
    """The prompts of a bench. Raises RequestError if an option needs more prompts than were found."""
    from pipelines.evaluation.measure import bench_prompts

    requests = bench_prompts(uri, bundle, path, count or 8, max_tokens, chat)
    found = len(requests.tokens)
    for option, size in (("--count", count or 1), ("--batch", max(batch, default=1))):
        if size > found:
            raise RequestError(f"{option} is {size}, and bench has {found} prompts; lower it, or give it more prompts")
    return requests


def _check_plot(plot: Path | None) -> None:
    """Raise UserError if no picture can be written at `plot`, before anything is measured. Folders above are made."""
    from tidar_core.artifacts.store.output_folder import require_writable

    if plot is not None:
        if plot.is_dir():
            raise RequestError(f"--plot is {plot}, a folder; give the path of a PNG file")
        require_writable(str(plot))


def _note_without_drafts(bundle: Any, uri: str) -> None:
    """Print how to convert a checkpoint."""
    from tidar_core.artifacts.model.bundle_info import no_drafts_note

    if not bundle.model.config.drafting:
        note(no_drafts_note(uri))
