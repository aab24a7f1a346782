"""Benchmark of a dual-mode train step against a next-token train step on the same rows.

    python -m pipelines.training.train_bench --shape quickstart --row-lens 256 512 --dtypes fp32 bf16

Forward and backward on random packed rows; both objectives take turns within every repeat, so that a noisy machine
affects both equally. The method's floor is about 2: the doubled row has twice the tokens and twice the visible pairs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.sequence_parallel import activation_bytes
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["measure"]


def measure(
    model: TidarModel, *, row_len: int, rows: int, documents: int, block_len: int, repeats: int
) -> dict[str, Any]:
    """Clean tokens per second of both objectives and their ratio: medians of `repeats` after a warm-up."""
    device, vocab = model.embedding.weight.device, model.config.vocab_size
    ids = torch.randint(0, vocab - 1, (rows, row_len), generator=torch.Generator().manual_seed(0)).to(device)
    ends = torch.randint(0, row_len, (rows, documents - 1), generator=torch.Generator().manual_seed(1))
    document = torch.zeros_like(ids).scatter_(1, ends.to(device), 1).cumsum(1)
    seconds: dict[str, list[float]] = {"ar": [], "dual": []}
    objectives = {name: Objective(model, dual=name == "dual", block_len=block_len).train() for name in seconds}
    for _ in range(repeats + 1):
        for name, objective in objectives.items():
            began = time.perf_counter()
            _step(objective, objective.batch(ids, document))
            seconds[name].append(time.perf_counter() - began)
    ar, dual = (statistics.median(times[1:]) for times in seconds.values())
    ratios = [d / a for a, d in zip(seconds["ar"][1:], seconds["dual"][1:])]
    kept = {}
    for name, objective in objectives.items():
        with activation_bytes(objective) as held:
            objective(objective.batch(ids, document))
        kept[f"{name}_activation_mib"] = held[0] / 2**20
    return {
        "row_len": row_len,
        "ar_tokens_per_second": ids.numel() / ar,
        "dual_tokens_per_second": ids.numel() / dual,
        "dual_over_ar": dual / ar,
        "dual_over_ar_spread": (min(ratios), max(ratios)),
        **kept,
    }


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    for name in ("tokens", "documents", "block_len", "repeats", "threads"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be above 0")
    torch.set_num_threads(given.threads)
    points = []
    for dtype in given.dtypes:
        model = TidarModel(named_shape(given.shape))
        model.init_weights(0)
        model = model.to(given.device, DTYPES[dtype])
        for row_len in given.row_lens:
            rows = max(1, given.tokens // row_len)
            point = measure(
                model, row_len=row_len, rows=rows, documents=given.documents, block_len=given.block_len,
                repeats=given.repeats,
            )  # fmt: skip
            points.append({"dtype": dtype, "rows": rows, **point})
    facts = {name: getattr(given, name) for name in ("shape", "block_len", "documents", "threads", "device")}
    print(json.dumps({**facts, "points": points}, indent=2))


def _step(objective: Objective, batch: TrainBatch) -> None:
    objective.zero_grad(set_to_none=True)
    dual_mode_loss(objective(batch), 1.0, *label_counts(batch)).backward()
    if batch.token_BL.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
