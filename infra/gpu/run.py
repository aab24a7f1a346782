"""A whole training run on one GPU, from random weights to a bundle and its curves."""

import argparse
import json
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rows import PREPARED, load_rows

from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.store.provenance import made_by
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer
from tidar_core.training.flops import matmul_peak
from tidar_core.training.packing import PackedRows
from tidar_core.training.recipe import start_draft_link
from tidar_core.training.schedule import Schedule
from tidar_core.training.trainer import Phase, Progress, Trainer
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["Setting", "fresh_model", "print_line", "ready_trainer", "synthetic_rows", "train"]

H100_PEAK = 989.4e12
"""Dense bf16 operations a second of an H100 SXM, by its data sheet."""
HELD_OUT_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The device with its dtype and peaks."""

    device: torch.device
    dtype: torch.dtype
    name: str
    peak: float
    """Operations a second by the data sheet, or measured without a data sheet."""
    measured_peak: float

    @staticmethod
    def here(device: str | None) -> "Setting":
        """The named device; without a name the GPU if there is one, else the CPU."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda":
            measured = matmul_peak(place, torch.bfloat16)
            name = torch.cuda.get_device_name(place)
            peak = H100_PEAK if "H100" in name or "H200" in name else measured
            return Setting(device=place, dtype=torch.bfloat16, name=name, peak=peak, measured_peak=measured)
        measured = matmul_peak(place, torch.float32, size=1024, repeats=3)
        return Setting(device=place, dtype=torch.float32, name="CPU", peak=measured, measured_peak=measured)


def train(arguments: argparse.Namespace, preparing: subprocess.Popen[bytes]) -> None:
    """Train both phases, and write bundle, report and curves. The process `preparing` writes the rows meanwhile."""
    arguments.report.mkdir(parents=True, exist_ok=True)
    setting = Setting.here(arguments.device)
    config = named_shape(arguments.shape)
    placeholder = synthetic_rows(arguments.rows_per_forward, arguments.row_len, config.vocab_size, setting.device)
    phases = _phases(arguments, seconds=1.0)
    trainer, form = ready_trainer(arguments, setting, phases, placeholder)
    print_line(arguments, f"kernels ready: {form}")
    if preparing.wait():
        raise SystemExit("the rows could not be prepared; see above")
    rows = {split: load_rows(arguments.out, split, setting.device) for split in ("train", "held_out")}
    held_out = _whole_forwards(rows["held_out"], arguments.rows_per_forward)
    tokenizer = load_tokenizer(arguments.out / "tokenizer")
    print_line(arguments, f"{len(rows['train'].input_ids_BS)} rows to train on, {len(held_out.input_ids_BS)} held out")

    evaluations = {"start": asdict(trainer.evaluate(held_out, rows_per_forward=arguments.rows_per_forward))}
    left = arguments.wall_seconds - arguments.reserve_seconds - (time.perf_counter() - arguments.began)
    seconds = min(arguments.seconds, left)
    if seconds <= 0:
        raise SystemExit("no time is left to train; raise --wall-seconds")
    curves = arguments.report / "curves.jsonl"
    curves.unlink(missing_ok=True)
    last: dict[str, Progress] = {}
    try:
        for name, phase in _phases(arguments, seconds).items():
            print_line(arguments, f"{name} phase: {phase.seconds:.0f} s")
            last[name] = trainer.train(phase, rows["train"], _writer(arguments, curves, name, setting))
            evaluations[name] = asdict(trainer.evaluate(held_out, rows_per_forward=arguments.rows_per_forward))
            print_line(arguments, f"after {name}: {json.dumps(evaluations[name])}")
    finally:  # trained weights are kept after any error
        _write_report(arguments, setting, form, evaluations, last, curves)
        _save(arguments, trainer, tokenizer, {"evaluations": evaluations})
    _plot(arguments, curves, evaluations)
    _sample_texts(arguments, setting, trainer.model, tokenizer, held_out)
    print_line(arguments, f"done; the bundle is {arguments.out / 'bundle'}")


def fresh_model(arguments: argparse.Namespace, setting: Setting) -> TidarModel:
    """Random weights of the shape, on the device."""
    model = TidarModel(named_shape(arguments.shape))
    model.init_weights(arguments.seed)
    if arguments.link_rank:
        start_draft_link(model, arguments.link_rank, seed=arguments.seed)
    return model.to(setting.device, setting.dtype)


def ready_trainer(
    arguments: argparse.Namespace, setting: Setting, phases: dict[str, Phase], rows: PackedRows
) -> tuple[Trainer, str]:
    """A trainer with compiled kernels, in the fastest form that works here, and the name of the form."""
    forms: list[tuple[str, dict[str, Any]]] = [
        ("compiled layers, FlexAttention", {"compiled": True}),
        ("eager layers, compiled FlexAttention", {}),
        ("eager layers, dense attention", {"attention": DenseAttention}),
    ]
    if setting.device.type != "cuda":
        forms = [("eager layers, CPU", {})]
    for name, options in forms[1:] if arguments.eager and len(forms) > 1 else forms:
        try:
            trainer = Trainer(fresh_model(arguments, setting), block_len=arguments.block_len, **options)
            for phase in phases.values():
                began = time.perf_counter()
                trainer.warm_up(phase, rows)
                kind = "dual" if phase.dual else "ar"
                print_line(arguments, f"{name}: first {kind} forward and backward {time.perf_counter() - began:.1f} s")
            return trainer, name
        except Exception:
            traceback.print_exc()
            print_line(arguments, f"{name} failed; trying the next form")
        torch._dynamo.reset()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    raise SystemExit("no form of training works here")


def synthetic_rows(count: int, row_len: int, vocab_size: int, device: torch.device) -> PackedRows:
    """Rows of random tokens, in documents of a few hundred tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size - 64, (count, row_len), generator=generator, dtype=torch.int32)
    documents = (torch.rand(count, row_len, generator=generator) < 1 / 400).cumsum(1).int()
    return PackedRows(tokens.to(device), documents.to(device))


def print_line(arguments: argparse.Namespace, text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.perf_counter() - arguments.began:6.1f} s] {text}", flush=True)


def _phases(arguments: argparse.Namespace, seconds: float) -> dict[str, Phase]:
    common = {"rows_per_step": arguments.rows_per_step, "rows_per_forward": arguments.rows_per_forward}
    ar, dual = arguments.learning_rate, arguments.dual_learning_rate
    return {
        "ar": Phase(
            dual=False,
            schedule=Schedule(peak=ar, minimum=0.3 * ar, warmup=0.05),
            seconds=seconds * arguments.ar_share,
            seed=arguments.seed,
            **common,
        ),
        "dual": Phase(
            dual=True,
            schedule=Schedule(peak=dual, minimum=0.02 * dual, warmup=0.03),
            seconds=seconds * (1 - arguments.ar_share),
            seed=arguments.seed + 1,
            **common,
        ),
    }


def _writer(arguments: argparse.Namespace, curves: Path, phase: str, setting: Setting) -> Callable[[Progress], None]:
    def write(progress: Progress) -> None:
        mfu = progress.flops_per_second / setting.peak
        with curves.open("a") as file:
            file.write(json.dumps({"phase": phase, "mfu": mfu} | asdict(progress)) + "\n")
        if progress.steps % 50 == 0:
            losses = progress.losses
            accuracy = [share for share in losses.draft_accuracy_K if share is not None]
            print_line(
                arguments,
                f"{phase} step {progress.steps}: "
                f"ar {losses.ar_loss or 0:.3f} diffusion {losses.diffusion_loss or 0:.3f} "
                f"draft {sum(accuracy) / max(1, len(accuracy)):.3f} norm {progress.grad_norm:.2f} "
                f"{progress.tokens_per_second / 1e3:.0f}k tokens/s mfu {mfu:.3f} eta {progress.eta_seconds:.0f} s",
            )

    return write


def _whole_forwards(rows: PackedRows, rows_per_forward: int) -> PackedRows:
    """At most HELD_OUT_ROWS rows that fill their forwards, so that no other shape is compiled."""
    count = min(HELD_OUT_ROWS, len(rows.input_ids_BS)) // rows_per_forward * rows_per_forward
    if not count:
        repeats = -(-rows_per_forward // len(rows.input_ids_BS))
        rows = PackedRows(rows.input_ids_BS.repeat(repeats, 1), rows.document_ids_BS.repeat(repeats, 1))
        count = rows_per_forward
    return PackedRows(rows.input_ids_BS[:count], rows.document_ids_BS[:count])


def _write_report(arguments: argparse.Namespace, setting: Setting, form: str, evaluations: dict[str, Any],
                  last: dict[str, Progress], curves: Path) -> None:  # fmt: skip
    lines = [json.loads(line) for line in curves.read_text().splitlines()] if curves.exists() else []
    speeds = {}
    for name in last:
        steady = sorted(line["flops_per_second"] for line in lines if line["phase"] == name)
        tokens = sorted(line["tokens_per_second"] for line in lines if line["phase"] == name)
        speeds[name] = {
            "median_tokens_per_second": tokens[len(tokens) // 2],
            "median_flops_per_second": steady[len(steady) // 2],
            "mfu": steady[len(steady) // 2] / setting.peak,
            "mfu_of_measured_peak": steady[len(steady) // 2] / setting.measured_peak,
        }
    memory = torch.cuda.max_memory_allocated() / 2**30 if setting.device.type == "cuda" else None
    content = {
        "device": setting.name,
        "torch": torch.__version__,
        "peak_flops_per_second": setting.peak,
        "measured_matmul_flops_per_second": setting.measured_peak,
        "form": form,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "parameters": sum(p.numel() for p in TidarModel(named_shape(arguments.shape)).parameters()),
        "data": json.loads((arguments.out / PREPARED).read_text()),
        "evaluations": evaluations,
        "phases": {name: asdict(progress) | speeds[name] for name, progress in last.items()},
        "memory_gib": memory,
        "wall_seconds": time.perf_counter() - arguments.began,
    }
    (arguments.report / "run.json").write_text(json.dumps(content, indent=2) + "\n")
    prompts = arguments.corpus / "prompts.jsonl"
    if prompts.exists():
        shutil.copy(prompts, arguments.out / "prompts.jsonl")  # for `tidar bench`, when the corpus is gone


def _save(arguments: argparse.Namespace, trainer: Trainer, tokenizer: Tokenizer, lineage: dict[str, Any]) -> None:
    """Write the bundle, and check that its weights equal the weights in memory."""
    where = arguments.out / "bundle"
    mask_id = trainer.model.config.mask_id
    assert mask_id is not None
    job = {name: str(value) for name, value in vars(arguments).items()}
    save_bundle(
        str(where), trainer.model, tokenizer, block_len=arguments.block_len, mask_id=mask_id, objective="dual",
        lineage=lineage, made_by=made_by(job, {}),
    )  # fmt: skip
    loaded = load_bundle(where, dtype=trainer.model.embedding.weight.dtype, device=trainer.device)
    theirs = dict(loaded.model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.named_parameters()), "weights differ"
    print_line(arguments, f"bundle saved and read back: {where}")


@torch.no_grad()
def _sample_texts(arguments: argparse.Namespace, setting: Setting, model: TidarModel, tokenizer: Tokenizer,
                  rows: PackedRows) -> None:  # fmt: skip
    """Write greedy continuations of held-out beginnings, by a forward over all tokens for each new token."""
    plain = TidarModel(model.config).to(setting.device, setting.dtype)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    begun = min(96, rows.input_ids_BS.shape[1] // 2)
    token_BL, documents = rows.input_ids_BS[:8, :begun].long(), rows.document_ids_BS[:8, :begun].long()
    for _ in range(64):
        layout = causal_layout(documents)
        hidden = plain(token_BL, layout.position, DenseAttention(layout))
        token_BL = torch.cat([token_BL, plain.head(hidden[:, -1:]).argmax(-1)], 1)
        documents = torch.cat([documents, documents[:, -1:]], 1)
    parts = [
        f"--- prompt\n{tokenizer.decode(ids[:begun])}\n"
        f"--- continuation\n{tokenizer.continued(ids[:begun], ids[begun:])}\n"
        for ids in token_BL.tolist()
    ]
    (arguments.report / "samples.txt").write_text("\n".join(parts))


def _plot(arguments: argparse.Namespace, curves: Path, evaluations: dict[str, Any]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    lines = [json.loads(line) for line in curves.read_text().splitlines()]
    figure, (losses, drafts) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    offset = 0
    for phase, color in (("ar", "tab:blue"), ("dual", "tab:orange")):
        own = [line for line in lines if line["phase"] == phase]
        tokens = [(offset + line["tokens"]) / 1e6 for line in own]
        losses.plot(tokens, [line["losses"]["ar_loss"] for line in own], color=color, label=f"AR loss, {phase} phase")
        if phase == "dual" and own:
            diffusion = [line["losses"]["diffusion_loss"] for line in own]
            losses.plot(tokens, diffusion, color="tab:red", label="diffusion loss")
        offset += own[-1]["tokens"] if own else 0
    losses.set(xlabel="clean tokens, millions", ylabel="nats per token", ylim=(0, 8))
    losses.legend()
    for phase, evaluation in evaluations.items():
        drafts.plot(range(arguments.block_len), evaluation["draft_accuracy_K"], marker="o", label=f"after {phase}")
    drafts.set(xlabel="offset in the block", ylabel="held-out draft accuracy", ylim=(0, 1))
    drafts.legend()
    figure.tight_layout()
    figure.savefig(arguments.report / "curves.png", dpi=110)
