"""How good is a bundle on text it has not seen, and does it say what its autoregressive mode says?

Bundle + held-out rows -> report.json, report.md and plots. Losses are means over labels, in nats; texts are greedy, in
fp32, and compared token for token with the plain one-token-at-a-time loop, which shares no cache and no layout with the
decoder.
"""

import json
from collections.abc import Callable
from typing import Any

import ray
import torch

from pipelines.board import pin, watched_board
from pipelines.cluster import connect, original_error
from pipelines.jobs import EvaluateJob
from pipelines.plots import acceptance_plot, speed_plot
from tidar_core.artifacts import locations
from tidar_core.artifacts.bundle import Bundle, load_bundle
from tidar_core.artifacts.made_by import made_by, write_made_by
from tidar_core.artifacts.shards import ShardReader, verify_shards
from tidar_core.autoregressive import generate_autoregressive
from tidar_core.benchmark import compare_modes, prompts_in_all
from tidar_core.config import SamplingConfig
from tidar_core.errors import ConfigError, ShardError
from tidar_core.layout import PADDING
from tidar_core.losses import LossSums
from tidar_core.modes import MODES
from tidar_core.objective import Objective

__all__ = ["REPORT", "evaluate", "held_out_losses"]

REPORT = "report.json"
ROWS_AT_ONCE = 8

Advance = Callable[[], None]


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Run the job on the cluster and give the report; an existing one of the same job and bundle is replaced."""
    job = job.model_copy(
        update={name: locations.absolute(getattr(job, name)) for name in ("bundle", "shards", "output")}
    )
    connect()
    units = (
        -(-job.loss_rows // ROWS_AT_ONCE)
        + job.prompts
        + prompts_in_all(job.prompts, modes=len(MODES), batch=job.batch, repeats=job.repeats)
    )
    try:
        with watched_board("evaluate", total=units, unit="parts") as board:
            return ray.get(_on_node.options(num_gpus=job.gpus, num_cpus=job.cpus).remote(job, board))
    except Exception as error:
        original = original_error(error)
        raise original from (error if original is not error else None)


@ray.remote(max_retries=0)
def _on_node(job: EvaluateJob, board: Any) -> dict[str, Any]:
    torch.set_num_threads(job.cpus)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        pin(board, done, {})

    verify_shards(job.shards)
    bundle = load_bundle(job.bundle, device="cuda" if job.gpus else "cpu")
    report = measured(job, bundle, ShardReader(job.shards, "held_out"), advance)
    _write(job, report)
    return report


def measured(job: EvaluateJob, bundle: Bundle, reader: ShardReader, advance: Advance) -> dict[str, Any]:
    """The report of a loaded bundle on held-out rows."""
    if bundle.tokenizer.fingerprint != reader.manifest.tokenizer:
        raise ConfigError(f"{job.shards} were made with another tokenizer than {job.bundle} has; pack with its own")
    block_len = bundle.info.block_len
    losses = _losses(bundle, reader, job.loss_rows, advance)
    prompts = _prompts(reader, job.prompts, job.prompt_len)
    sampling = SamplingConfig(max_tokens=job.max_tokens, eos_ids=(bundle.tokenizer.eos_id,))
    plain = []
    for prompt in prompts:
        plain.append(generate_autoregressive(bundle.model, prompt, sampling))
        advance()
    modes = compare_modes(
        bundle.model,
        prompts,
        sampling,
        block_len=block_len,
        batch=job.batch,
        repeats=job.repeats,
        context_len=job.prompt_len + job.max_tokens,
        on_prompt=advance,
    )
    single_pass, ar = modes["single-pass"], modes["autoregressive"]
    equal = sum(len({text, *others}) == 1 for text, *others in zip(plain, *(mode.texts for mode in modes.values())))
    return {
        "bundle": job.bundle,
        "bundle_hash": bundle.info.bundle_hash,
        "shards": reader.manifest.identity,
        "block_len": block_len,
        **losses,
        "prompts": len(prompts),
        "prompts_equal": equal,
        "greedy_equal": equal == len(prompts),
        "tokens_per_forward": single_pass.tokens_per_forward,
        "tokens_per_round": single_pass.tokens_per_round,
        "acceptance_histogram": single_pass.acceptance_histogram,
        "acceptance_by_position": single_pass.acceptance_by_position,
        "speed_over_ar": single_pass.tokens_per_second / ar.tokens_per_second,
        "batch": job.batch,
        "threads": torch.get_num_threads(),
        "modes": {name: mode.figures() for name, mode in modes.items()},
    }


def held_out_losses(bundle: str, shards: str, *, rows: int, threads: int) -> dict[str, float]:
    """AR and diffusion loss of a bundle, measured in this process."""
    torch.set_num_threads(threads)
    found = _losses(load_bundle(bundle), ShardReader(shards, "held_out"), rows, lambda: None)
    return {name: found[name] for name in ("ar_loss", "diffusion_loss")}


@torch.inference_mode()
def _losses(bundle: Bundle, reader: ShardReader, rows: int, advance: Advance) -> dict[str, Any]:
    """Held-out losses, and how often the likeliest draft is the held-out token, by offset in the block."""
    block_len = bundle.info.block_len
    objective = Objective(bundle.model, dual=True, block_len=block_len)
    device = bundle.model.embedding.weight.device
    rows = min(rows, len(reader))
    if not rows:
        raise ShardError(f"{reader.uri} holds no held-out rows; pack with a larger held_out")
    parts: list[LossSums] = []
    for first in range(0, rows, ROWS_AT_ONCE):
        packed = reader.rows(range(first, min(first + ROWS_AT_ONCE, rows)))
        parts.append(objective(objective.batch(packed.input_ids_BS.to(device), packed.document_ids_BS.to(device))))
        advance()

    def total(name: str) -> torch.Tensor:
        return torch.stack([getattr(part, name) for part in parts]).sum(0)

    accuracy_K = total("draft_hits_K") / total("draft_count_K").clamp(min=1)
    return {
        "held_out_rows": rows,
        "ar_loss": float(total("ar_sum") / total("ar_count").clamp(min=1)),
        "diffusion_loss": float(total("diffusion_sum") / total("diffusion_count").clamp(min=1)),
        "draft_accuracy": accuracy_K.tolist(),
    }


def _prompts(reader: ShardReader, count: int, prompt_len: int) -> list[tuple[int, ...]]:
    """The first tokens of the first held-out documents that begin in a row with room for them."""
    prompts: list[tuple[int, ...]] = []
    last_document = PADDING
    for index in range(len(reader)):
        row = reader.rows([index])
        ids, documents = row.input_ids_BS[0].tolist(), row.document_ids_BS[0].tolist()
        for start, document in enumerate(documents):
            begins = document != PADDING and document != (documents[start - 1] if start else last_document)
            end = start + prompt_len
            if begins and end <= len(ids) and documents[end - 1] == document:
                prompts.append(tuple(ids[start:end]))
        last_document = documents[-1]
        if len(prompts) >= count:
            return prompts[:count]
    if prompts:
        return prompts
    raise ShardError(
        f"no held-out document begins with {prompt_len} tokens in one row; lower prompt_len or pack with more held_out"
    )


def _write(job: EvaluateJob, report: dict[str, Any]) -> None:
    parents = {"bundle": report["bundle_hash"], "shards": report["shards"]}
    with locations.staged_folder(job.output, REPORT) as folder:
        write_made_by(folder, made_by(job.model_dump(mode="json"), parents))
        plot = acceptance_plot(
            report["acceptance_histogram"], report["acceptance_by_position"], report["draft_accuracy"]
        )
        locations.write_bytes(locations.join(folder, "acceptance.png"), plot)
        locations.write_bytes(locations.join(folder, "speed.png"), speed_plot(report["modes"]))
        locations.write_bytes(locations.join(folder, "report.md"), _markdown(report).encode())
        locations.write_bytes(locations.join(folder, REPORT), json.dumps(report, indent=2).encode())


def _markdown(report: dict[str, Any]) -> str:
    modes = "\n".join(
        f"| {name} | {m['tokens_per_second']:.1f} ({m['tokens_per_second_spread'][0]:.1f} to "
        f"{m['tokens_per_second_spread'][1]:.1f}) | {m['tokens_per_forward']:.2f} | {m['tokens_per_round']:.2f} | "
        f"{1000 * m['time_to_first_token_seconds']:.1f} | {'yes' if m['equal_to_ar'] else 'NO'} |"
        for name, m in report["modes"].items()
    )
    return f"""# Report on {report["bundle"]}

Bundle hash `{report["bundle_hash"]}`, block length {report["block_len"]}.

| held-out measure | value |
|---|---|
| AR loss (nats per token, {report["held_out_rows"]} rows) | {report["ar_loss"]:.4f} |
| diffusion loss (nats per token) | {report["diffusion_loss"]:.4f} |
| greedy texts equal to the plain AR loop | {report["prompts_equal"]} of {report["prompts"]} prompts |
| tokens per forward (greedy, single-pass) | {report["tokens_per_forward"]:.2f} |
| speed over the AR mode ({report["batch"]} at a time, {report["threads"]} threads) | {report["speed_over_ar"]:.2f} |

| mode | tokens/s (spread) | tokens per forward | tokens per round | first token, ms | equal to AR |
|---|---|---|---|---|---|
{modes}

![acceptance](acceptance.png)
![speed](speed.png)
"""
