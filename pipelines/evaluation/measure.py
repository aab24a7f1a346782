"""Measurements of a model on this machine: speed of decoding, and time of forwards.

This is the work of `tidar bench` and `tidar profile` after the model is loaded. Progress goes to standard error;
figures are plain values.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.cluster.console import stderr
from pipelines.cluster.progress import job_progress
from pipelines.evaluation.llama_cpp_baseline import against_llama_cpp, require_llama_cpp, require_same_tokens
from tidar_core.artifacts.model.bundle import DTYPES, Bundle, load_for_decoding
from tidar_core.artifacts.model.bundle_info import base_location, hf_location
from tidar_core.artifacts.model.latency_file import bundle_table, time_and_store
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat, turn_end_id
from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.config import AUTOREGRESSIVE, DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.step_plan import MODES
from tidar_core.errors import ConfigError, RequestError
from tidar_core.kernels.bandwidth import copy_bandwidth
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.planning.candidate_plans import all_candidates
from tidar_core.planning.decode_step_benchmark import StepCost, random_model, step_costs, step_plans
from tidar_core.planning.latency_table import measure_latency
from tidar_core.planning.mode_benchmark import compare_modes, prompts_in_all
from tidar_core.planning.plan_benchmark import compare_plans, plan_prompts
from tidar_core.planning.planner import AUTO
from tidar_core.planning.prompt_benchmark import ROOM, prompt_costs, random_prompt, require_room
from tidar_core.planning.step_timing import latency_shapes
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = [
    "BenchPrompts",
    "bench_prompts",
    "compared_modes",
    "compared_plans",
    "latency_curve",
    "loaded_bundle",
    "long_prompts",
    "random_shape",
    "shape_costs",
    "stored_latency",
]


def loaded_bundle(uri: str, threads: int, dtype: str, weights: str | None = None) -> Bundle:
    """A verified bundle or a checkpoint, on the GPU if there is one.

    threads  threads of torch in this process from now on
    dtype    a key of DTYPES
    weights  int8 or int4, by default neither
    """
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_for_decoding(uri, DTYPES[dtype], device, weights=weights)


@dataclass(frozen=True, slots=True)
class BenchPrompts:
    """Prompts of a bench in tokens."""

    tokens: list[tuple[int, ...]]
    end_ids: tuple[int, ...]
    """Tokens that end a text after these prompts."""
    chat: bool
    """Whether each prompt is a user's message in the model's chat template; otherwise it is a text to continue."""
    shortened: int = 0
    """Prompts that lost their beginning, because the context cannot hold prompt and completion."""


def bench_prompts(
    uri: str, bundle: Bundle, path: Path | None, count: int, max_tokens: int, chat: bool | None = None
) -> BenchPrompts:
    """The first prompts of a file; a prompt that the context cannot hold with its completion loses its beginning.

    uri   location of the bundle, with its chat template
    path  prompts file; None: beginnings of Python code, which are always continued
    chat  whether a prompt is a user's message; by default it is if the model has a chat template
    """
    context_len = bundle.model.config.context_len
    if max_tokens >= context_len:
        raise RequestError(f"max_tokens is {max_tokens}; the context of {context_len} must hold a prompt as well")
    template = None if chat is False or path is None else load_chat_template(base_location(uri, bundle.info))
    if chat and template is None:
        needed = "--chat needs a prompts file" if path is None else f"--chat needs a chat template, and {uri} has none"
        raise RequestError(f"{needed}; drop --chat")
    texts, tokenizer, turn_end = read_prompts(path, count), bundle.tokenizer, None
    if template is None:
        encoded = tokenizer.encode_batch(texts, framed=True)
    else:
        encoded = [encode_chat(template, tokenizer, [{"role": "user", "content": text}]) for text in texts]
        turn_end = turn_end_id(template, tokenizer)
    end_ids = bundle.end_ids if turn_end is None else tuple(dict.fromkeys([*bundle.end_ids, turn_end]))
    room = context_len - max_tokens
    tokens, shortened = [tuple(ids)[-room:] for ids in encoded], sum(len(ids) > room for ids in encoded)
    return BenchPrompts(tokens, end_ids, template is not None, shortened)


def compared_modes(
    model: TidarModel,
    requests: BenchPrompts,
    *,
    max_tokens: int,
    block_len: int,
    batch: int,
    repeats: int,
    uri: str,
    transformers: bool = False,
    llama_cpp: Path | None = None,
    modes: Sequence[str] = (*MODES, AUTO),
    plot: Path | None = None,
) -> dict[str, Any]:
    """Modes of the model on the same prompts in one run: the autoregressive mode alone if it does not draft.

    uri           location of the bundle, which may have a latency table beside it
    transformers  whether transformers' `generate` is timed on the prompts too
    llama_cpp     GGUF file that llama.cpp is timed with on the prompts too
    modes         modes of a model that drafts, the autoregressive mode among them
    plot          PNG file to write speeds and acceptance to
    """
    prompts, sampling = requests.tokens, SamplingConfig(max_tokens=max_tokens, eos_ids=requests.end_ids)
    if llama_cpp is not None:
        require_llama_cpp(llama_cpp)
        require_same_tokens(llama_cpp, prompts, load_tokenizer(hf_location(uri)))
    modes = modes if model.config.drafting else (AUTOREGRESSIVE,)
    total = prompts_in_all(len(prompts), modes=len(modes), batch=batch, repeats=repeats)
    with job_progress("bench", total=total, unit="prompts") as show:
        done = iter(range(1, total + 1))
        results = compare_modes(
            model, prompts, sampling, block_len=block_len, batch=batch, repeats=repeats, modes=modes,
            context_len=max(map(len, prompts)) + sampling.max_tokens, on_prompt=lambda: show(next(done), {}),
            table=partial(bundle_table, uri),
        )  # fmt: skip
    facts: dict[str, Any] = {
        **_device(model),
        "block_len": block_len,
        "batch": batch,
        "prompts": len(prompts),
        "prompts_shortened": requests.shortened,
        "chat": requests.chat,
        "modes": {name: mode.figures() for name, mode in results.items()},
    }
    if llama_cpp is not None:
        facts["llama_cpp"] = against_llama_cpp(llama_cpp, prompts, sampling, results[AUTOREGRESSIVE], repeats=repeats)
    if transformers:
        from pipelines.evaluation.transformers_baseline import against_transformers

        ours, like = results[AUTOREGRESSIVE], model.embedding.weight
        facts["transformers"] = against_transformers(uri, like, prompts, sampling, ours, repeats=repeats)
    if plot is not None:
        from pipelines.evaluation.plots import bench_plot

        locations.write_bytes(str(plot), bench_plot(facts["modes"]))
    return facts


def compared_plans(
    model: TidarModel,
    requests: BenchPrompts,
    *,
    max_tokens: int,
    block_len: int,
    batch: int,
    repeats: int,
    uri: str,
) -> dict[str, Any]:
    """`auto` and every fixed plan on the same prompts in one run; ConfigError for a model that does not draft.

    uri  location of the bundle, which may have a latency table beside it
    """
    if not model.config.drafting:
        raise ConfigError(f"{uri} makes no drafts, so it has one plan; give a bundle that drafts")
    sampling = SamplingConfig(max_tokens=max_tokens, eos_ids=requests.end_ids)
    context_len = max(map(len, requests.tokens)) + max_tokens
    total = plan_prompts(len(requests.tokens), len(all_candidates(block_len)), batch=batch, repeats=repeats)
    with job_progress("bench", total=total, unit="prompts") as show:
        done = iter(range(1, total + 1))
        found = compare_plans(
            model, requests.tokens, sampling, block_len=block_len, batch=batch, repeats=repeats,
            context_len=context_len, table=partial(bundle_table, uri), on_prompt=lambda: show(next(done), {}),
        )  # fmt: skip
    facts = {"prompts": len(requests.tokens), "prompts_shortened": requests.shortened}
    return {**_device(model), "block_len": block_len, "batch": batch, **facts, **asdict(found)}


def long_prompts(
    model: TidarModel,
    lengths: Sequence[int],
    *,
    repeats: int,
    shape: str | None = None,
    transformers_of: str | None = None,
) -> dict[str, Any]:
    """Times of prompts of these lengths, of decode steps behind them, and of others that wait meanwhile.

    shape            name of the model's shape, if its weights are random
    transformers_of  location of the model; if given, transformers reads the same prompts
    """
    require_room(model, lengths)
    with job_progress("bench", total=len(set(lengths)), unit="prompts") as show:
        done = iter(range(1, len(set(lengths)) + 1))
        costs = prompt_costs(
            model, lengths, repeats=repeats,
            on_prompt=lambda cost: show(next(done), {"tokens": cost.prompt_tokens, "s": cost.first_token_seconds}),
        )  # fmt: skip
    facts: dict[str, Any] = {
        **_device(model),
        **({"shape": shape} if shape else {}),
        "prompts": [asdict(cost) for cost in costs],
    }
    if transformers_of is not None:
        from pipelines.evaluation.transformers_baseline import prompt_seconds

        prompts = [random_prompt(model, cost.prompt_tokens) for cost in costs]
        theirs = prompt_seconds(transformers_of, model.embedding.weight, prompts, repeats=repeats)
        for cost, seconds in zip(facts["prompts"], theirs, strict=True):
            cost |= {"transformers_seconds": seconds, "over_transformers": seconds / cost["first_token_seconds"]}
    return facts


def latency_curve(model: TidarModel, *, batch: int) -> dict[str, Any]:
    """Free-token-slot curve: time of forwards of 1 to 512 query tokens, of up to `batch` sequences, by context."""
    rows = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    batches = [count for count in (1, 4, 16, 64) if count < batch] + [batch]
    contexts = [count for count in (64, 1024, 8192) if count < model.config.context_len]
    total = len(rows) * len(batches) * len(contexts)
    with job_progress("profile", total=total, unit="shapes") as show:
        done = iter(range(1, total + 1))
        table = measure_latency(
            model, rows=rows, batches=batches, contexts=contexts, on_point=lambda: show(next(done), {})
        )
    return {
        **_device(model),
        "points": [asdict(point) for point in table.points],
        "knee_rows": table.knee_rows(),
    }


def stored_latency(uri: str, bundle: Bundle, *, batch: int) -> str:
    """Time the planner's decode steps, up to `batch` sequences; returns the address of the stored latency table."""
    decoder = Decoder(bundle.model, DraftConfig(block_len=bundle.info.block_len), slots=batch)
    with job_progress("planner's table", total=len(latency_shapes(decoder)), unit="steps") as show:
        done = iter(range(1, len(latency_shapes(decoder)) + 1))
        return time_and_store(uri, decoder, on_point=lambda: show(next(done), {}))


def random_shape(shape: str, dtype: str, weights: str | None, threads: int, lengths: Sequence[int] = ()) -> TidarModel:
    """A published shape with random weights, ready to decode on the GPU if there is one.

    threads  threads of torch in this process from now on
    lengths  of prompts; the context is as long as they need
    """
    torch.set_num_threads(threads)
    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), named_shape(shape)
    config = replace(config, context_len=max(config.context_len, *(length + ROOM for length in lengths), 0))
    model = random_model(config, DTYPES[dtype], device)
    prepare_for_decoding(model, weights)
    return model


def shape_costs(
    shape: str, dtype: str, weights: str | None, threads: int, *, block_len: int, batches: Sequence[int],
    contexts: Sequence[int], repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Time of decode steps of a published shape with random weights, and the lower bound by memory bandwidth.

    shape, dtype, weights, threads  as `random_shape` takes them
    """
    named_shape(shape)  # an unknown shape is refused before anything is timed
    torch.set_num_threads(threads)
    bandwidth = copy_bandwidth(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = random_shape(shape, dtype, weights, threads)
    total = len(batches) * len(contexts) * len(step_plans(block_len))
    with job_progress("bench", total=total, unit="steps") as show:
        done = iter(range(1, total + 1))

        def report(cost: StepCost) -> None:
            show(next(done), {"batch": cost.batch, "context": cost.context, "ms": 1000 * cost.seconds})

        costs = step_costs(
            model, block_len=block_len, batches=batches, contexts=contexts, bandwidth=bandwidth, repeats=repeats,
            on_step=report,
        )  # fmt: skip
    if not costs:
        stderr.print("no cache of these batches and contexts fits into the memory of the device")
    return {
        **_device(model),
        "shape": shape,
        "block_len": block_len,
        "copy_bandwidth_bytes_per_second": bandwidth,
        "steps": [asdict(cost) for cost in costs],
    }


def _device(model: TidarModel) -> dict[str, Any]:
    weight = model.embedding.weight
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device)
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"device": name, "threads": torch.get_num_threads(), "dtype": dtype, "weights": model.weights or dtype}
