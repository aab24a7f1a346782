"""Benchmark of train steps on the same rows: next-token, dual mode, and drafts of a frozen checkpoint.

    python -m pipelines.training.train_bench --shape quickstart --row-lens 256 512 --dtypes fp32 bf16

Forward and backward on random packed rows. All objectives take turns within every repeat, so that a noisy machine
affects them equally. The floor of dual over next-token is about 2: the doubled row has twice the tokens and twice the
visible pairs. The floor of frozen over dual is about 0.5: the clean half goes forward alone.

Peak memory is of a process of its own for each objective: two steps with AdamW in fp32.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.config import AdapterConfig, ModelConfig
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import start_draft_adapter
from tidar_core.training.sequence_parallel import activation_bytes
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["measure", "peak_memory"]

KINDS = ("ar", "dual", "frozen")


def measure(
    model: TidarModel, *, row_len: int, rows: int, documents: int, block_len: int, repeats: int, adapter_rank: int
) -> dict[str, Any]:
    """Clean tokens per second of all objectives and their ratios: medians of `repeats` after a warm-up."""
    ids, document = _rows(model.config, row_len, rows, documents, model.embedding.weight.device)
    objectives = {kind: _objective(kind, model, block_len, adapter_rank) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats + 1):
        for kind, objective in objectives.items():
            began = time.perf_counter()
            _step(objective, objective.batch(ids, document))
            seconds[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    figures: dict[str, Any] = {"row_len": row_len}
    figures |= {f"{kind}_tokens_per_second": ids.numel() / median for kind, median in medians.items()}
    for kind, other in (("dual", "ar"), ("frozen", "dual")):
        ratios = [a / b for a, b in zip(seconds[kind][1:], seconds[other][1:])]
        figures[f"{kind}_over_{other}"] = medians[kind] / medians[other]
        figures[f"{kind}_over_{other}_spread"] = (min(ratios), max(ratios))
    for kind, objective in objectives.items():
        with activation_bytes(objective) as held:
            objective(objective.batch(ids, document))
        figures[f"{kind}_activation_mib"] = held[0] / 2**20
    return figures


def peak_memory(shape: str, dtype: str, **sizes: int) -> dict[str, float]:
    """Most GiB that a process holds in two steps of each objective, on a CPU, and frozen over dual."""
    context, peaks = multiprocessing.get_context("spawn"), {}
    for kind in KINDS:
        with context.Pool(1) as pool:
            peaks[f"{kind}_peak_gib"] = pool.apply(_peak, (kind, shape, dtype, sizes))
    return peaks | {"frozen_over_dual_peak": peaks["frozen_peak_gib"] / peaks["dual_peak_gib"]}


def _peak(kind: str, shape: str, dtype: str, sizes: dict[str, int]) -> float:
    torch.set_num_threads(sizes["threads"])
    model = _model(shape, dtype)
    ids, document = _rows(model.config, sizes["row_len"], sizes["rows"], sizes["documents"], torch.device("cpu"))
    objective = _objective(kind, model, sizes["block_len"], sizes["adapter_rank"])
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        _step(objective, objective.batch(ids, document))
        optimizer.step()
    return _most_held() / 2**30


def _most_held() -> int:
    """Most bytes that this process held. The kernel's `ru_maxrss` is inherited from the parent, so it is not read."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _model(shape: str, dtype: str) -> TidarModel:
    model = TidarModel(named_shape(shape))
    model.init_weights(0)
    return model.to(DTYPES[dtype])


def _rows(
    config: ModelConfig, row_len: int, rows: int, documents: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and documents of packed rows [B, S]."""
    ids = torch.randint(0, config.vocab_size - 1, (rows, row_len), generator=torch.Generator().manual_seed(0))
    ends = torch.randint(0, row_len, (rows, documents - 1), generator=torch.Generator().manual_seed(1))
    return ids.to(device), torch.zeros_like(ids).scatter_(1, ends, 1).cumsum(1).to(device)


def _objective(kind: str, model: TidarModel, block_len: int, adapter_rank: int) -> Objective:
    """An objective on these weights; the frozen one on weights of a model of its own that shares them."""
    if kind == "frozen":
        with torch.device("meta"):
            frozen = TidarModel(replace(model.config, mask_id=None))
        frozen.load_state_dict({name: p.detach() for name, p in model.named_parameters()}, strict=False, assign=True)
        frozen.tie()
        start_draft_adapter(frozen, AdapterConfig(rank=adapter_rank, block_len=block_len), seed=0)
        model = frozen
    return Objective(model, dual=kind != "ar", block_len=block_len).train()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.training.train_bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", default="quickstart")
    parser.add_argument("--row-lens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=4096, help="clean tokens of a step")
    parser.add_argument("--documents", type=int, default=4, help="in each row")
    parser.add_argument("--block-len", type=int, default=8)
    parser.add_argument("--adapter-rank", type=int, default=32, help="of the frozen checkpoint's drafts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", action="store_true", help="measure peak memory too, on the CPU")
    given = parser.parse_args(arguments)
    for name in ("tokens", "documents", "block_len", "adapter_rank", "repeats", "threads"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be above 0")
    torch.set_num_threads(given.threads)
    points = []
    for dtype in given.dtypes:
        model = _model(given.shape, dtype).to(given.device)
        for row_len in given.row_lens:
            sizes = {"row_len": row_len, "rows": max(1, given.tokens // row_len), "documents": given.documents,
                     "block_len": given.block_len, "adapter_rank": given.adapter_rank}  # fmt: skip
            point = measure(model, **sizes, repeats=given.repeats)
            if given.peak:
                point |= peak_memory(given.shape, dtype, **sizes, threads=given.threads)
            points.append({"dtype": dtype, "rows": sizes["rows"], **point})
    names = ("shape", "block_len", "adapter_rank", "documents", "threads", "device")
    facts = {name: getattr(given, name) for name in names}
    print(json.dumps({**facts, "points": points}, indent=2))


def _step(objective: Objective, batch: TrainBatch) -> None:
    objective.zero_grad(set_to_none=True)
    dual_mode_loss(objective(batch), objective.recipe.alpha, *label_counts(batch)).backward()
    if batch.token_BL.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
