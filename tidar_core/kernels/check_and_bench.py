"""Check and benchmark of the kernels on this device.

Are the kernels right, and what share of the device do they use?

    python -m tidar_core.kernels.check_and_bench [--quick] [--sweep] [--flex-seconds N] [--json PATH]

First, each kernel is compared with its plain twin in float32, at the sizes of real models. Then attention is timed
against torch's own, whose gathering of pages into contiguous keys is not counted, and the fused kernels against plain
torch. A failure of our kernels is listed, does not stop the rest, and makes the exit status 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar_core.kernels import PLAIN, Kernels, triton_kernels
from tidar_core.kernels.bandwidth import copy_bandwidth
from tidar_core.kernels.timing import graph_time
from tidar_core.kernels.workloads import DRAFT_PLANS, PAGE_LEN, Case, Workload, flex_calls, own_calls, sdpa_calls
from tidar_core.transformer.shapes import named_shape

DEVICE = "cuda"
SHAPES = ("qwen2.5-1.5b", "qwen3-8b")
CONTEXTS, BATCHES = (512, 4096, 16384), (1, 8, 32)
QUICK_CONTEXTS, QUICK_BATCHES = (4096,), (1, 8)
ROUNDED = 2**-6
"""Largest allowed error of bfloat16, as a share of the largest number: a few roundings of 2^-9 each."""
EXACT = 1e-4
"""Largest allowed error of float32, as a share of the largest number."""


def main() -> int:
    """Run all parts and print a report.

    Returns the exit status: 0 if every kernel of ours ran and is right, 1 if not, 2 without a CUDA device.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tidar_core.kernels.check_and_bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one context, two batch sizes; about 90 seconds")
    parser.add_argument("--sweep", action="store_true", help="other tilings of attention, too; some minutes")
    parser.add_argument(
        "--flex-seconds", type=float, help="stop starting FlexAttention (a compile each) after this long"
    )
    parser.add_argument("--json", type=Path, help="write every number here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here; the kernels are measured on one", file=sys.stderr)
        return 2
    flex_seconds = (
        arguments.flex_seconds if arguments.flex_seconds is not None else (25.0 if arguments.quick else 240.0)
    )
    contexts, batches = (QUICK_CONTEXTS, QUICK_BATCHES) if arguments.quick else (CONTEXTS, BATCHES)
    kernels, bandwidth = triton_kernels(), copy_bandwidth(torch.device("cuda"))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_s": bandwidth,
    }
    print(f"{found['device']}, torch {torch.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    cases = [Case(*facts) for facts in product(SHAPES, DRAFT_PLANS, contexts, batches)]
    parts = {
        "checks": _checks(kernels),
        "fused": _fused(kernels),
        "sweep": _sweep(kernels) if arguments.sweep else (),
        "attention": _attention(kernels, cases, bandwidth, flex_seconds),
    }
    for name, rows in parts.items():
        print(f"{name} ..", flush=True)
        found[name] = list(rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    _report(found)
    failed = [row for part in ("checks", "fused", "attention") for row in found[part] if not row["ok"]]
    return 1 if failed else 0


def _checks(kernels: Kernels) -> Iterator[dict[str, Any]]:
    for shape, rows, dtype in product(SHAPES, DRAFT_PLANS, (torch.bfloat16, torch.float32)):
        if dtype == torch.float32 and rows not in (1, 33):  # slow to compile, and the tiling is the same
            continue
        case = Case(shape, rows, 1024, 5)
        name = f"attention {shape} R={rows} {str(dtype)[6:]}"
        yield _check(name, dtype, partial(_attention_pair, kernels, case, dtype))
    for shape, rows in product(SHAPES, (1, 272)):
        for step in ("add_rms_norm", "rotate_and_store", "silu_mul"):
            pair = partial(_fused_pair, kernels, shape, rows, step)
            yield _check(f"{step} {shape} rows={8 * rows}", torch.bfloat16, pair)


def _check(name: str, dtype: torch.dtype, pair: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Run a kernel and its float32 twin, and compare."""
    allowed = EXACT if dtype == torch.float32 else ROUNDED
    try:
        ours, twins = pair()
        error = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(ours, twins))
        row = {"name": name, "ok": error <= allowed, "error": error, "allowed": allowed}
    except Exception as failure:  # one kernel's failure must not hide the others'
        row = {"name": name, "ok": False, "error": _short(failure), "allowed": allowed}
    if not row["ok"]:
        print("FAIL", name, row["error"], flush=True)
    return row


def _attention_pair(kernels: Kernels, case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    workload = Workload(case, prefix_lens=[0, 1, 512, 1000, 1024], dtype=dtype, device=DEVICE)
    upcast = [x.float() if x.is_floating_point() else x for x in workload.arguments()]
    return [kernels.paged_attention(*workload.arguments())], [PLAIN.paged_attention(*upcast)]


def _fused_pair(kernels: Kernels, shape: str, rows: int, step: str) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for chosen, dtype in ((kernels, torch.bfloat16), (PLAIN, torch.float32)):
        call, pages = _fused_call(chosen, shape, 8, rows, step, dtype)
        answer = call()
        results.append([answer] if isinstance(answer, Tensor) else [*answer, pages])
    return results[0], results[1]


def _fused_call(
    kernels: Kernels, shape: str, batch: int, rows: int, step: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[[], Any], Tensor]:
    """A call of one fused kernel on random tensors, the same for every dtype, and the pages that it writes."""
    config = named_shape(shape)
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, generator=generator).bfloat16().to(dtype)

    heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
    pages = normal(batch * 2, PAGE_LEN, 2, kv_heads, size)
    if step == "silu_mul":
        gate_up = normal(batch, rows, 2 * config.intermediate_size)
        return lambda: kernels.silu_mul(gate_up), pages
    if step == "add_rms_norm":
        x, residual = normal(batch, rows, config.hidden_size), normal(batch, rows, config.hidden_size)
        weight = 1 + normal(config.hidden_size) / 8
        return lambda: kernels.add_rms_norm(x, residual, weight, config.norm_eps), pages
    qkv = normal(batch, rows, (heads + 2 * kv_heads) * size)
    cos, sin = (normal(batch, rows, size // 2).clamp(-1, 1).repeat(1, 1, 2) for _ in range(2))
    norm_weight = 1 + normal(heads + kv_heads, size) / 8 if config.qk_norm else None
    slots = torch.arange(batch * 2 * PAGE_LEN, device=DEVICE).view(batch, -1)[:, : min(rows, 16)]
    arguments = (qkv, norm_weight, cos, sin, pages, slots)
    return lambda: kernels.rotate_and_store(*arguments, eps=config.norm_eps, heads=heads), pages


def _fused(kernels: Kernels) -> Iterator[dict[str, Any]]:
    for shape, (batch, rows) in product(SHAPES, ((1, 1), (1, 272), (8, 272))):
        for step in ("add_rms_norm", "rotate_and_store", "silu_mul"):
            row: dict[str, Any] = {"shape": shape, "rows": batch * rows, "step": step, "ok": True}
            for name, chosen in (("ours", kernels), ("plain", PLAIN)):
                try:
                    row[name] = graph_time([_fused_call(chosen, shape, batch, rows, step)[0]] * 20)
                except Exception as failure:  # as in _check
                    row[name], row["ok"] = _short(failure), False
            yield row


def _attention(kernels: Kernels, cases: list[Case], bandwidth: float, flex_seconds: float) -> Iterator[dict[str, Any]]:
    flex_left, last = flex_seconds, None
    for case in cases:
        if last != (case.shape, case.rows):
            last = case.shape, case.rows
            print(f"  {case.shape}, {case.rows} rows", flush=True)
        workload = Workload(case, device=DEVICE)
        row: dict[str, Any] = {**asdict(case), "bytes": case.bytes, "operations": case.operations, "ok": True}
        try:
            row["ours"] = graph_time(own_calls(workload, kernels.paged_attention))
            row["bandwidth_share"] = case.bytes / row["ours"] * 1e6 / bandwidth
            row["teraflops"] = case.operations / row["ours"] / 1e6
        except Exception as failure:  # as in _check
            row["ours"], row["ok"] = _short(failure), False
        row["sdpa"] = _baseline(sdpa_calls, workload)
        row["flex"] = "late"
        if flex_left > 0:
            start = time.monotonic()
            row["flex"] = _baseline(flex_calls, workload)
            flex_left -= time.monotonic() - start
        del workload
        torch.cuda.empty_cache()
        yield row


def _baseline(calls: Callable[[Workload], list[Callable[[], Tensor]]], workload: Workload) -> float | str:
    try:
        return graph_time(calls(workload))
    except Exception as failure:  # a baseline may lack the shape or the memory; its cell reports it
        return f"error: {_short(failure)}"


def _sweep(kernels: Kernels) -> Iterator[dict[str, Any]]:
    """Time other tilings than the chosen one, at one context; tilings that do not fit the device are left out."""
    from tidar_core.kernels.paged_attention import choose_tiling

    for shape, rows, batch in product(SHAPES, DRAFT_PLANS, (1, 8)):
        case = Case(shape, rows, 4096, batch)
        workload, (heads, kv_heads, size) = Workload(case, device=DEVICE), case.heads
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        facts = {"query_rows": rows * heads // kv_heads, "pairs": batch * kv_heads, "max_context": case.context}
        default = choose_tiling(**facts, head_size=size, item_bytes=2, processors=processors)
        others = [replace(default, splits=splits) for splits in (1, 2, 4, 8, 16, 32, 64)]
        others += [replace(default, stages=stages) for stages in (2, 3, 4, 5)]
        others += [replace(default, tile_n=tile_n) for tile_n in (32, 128)]
        others += [replace(default, warps=warps) for warps in (4, 8)]
        if default.tile_m >= 64:
            others += [replace(default, tile_m=64, warps=4), replace(default, tile_m=128, warps=8)]
        timed = {}
        for tiling in dict.fromkeys([default, *others]):
            calls = own_calls(
                workload, lambda *arguments, tiling=tiling: kernels.paged_attention(*arguments, tiling=tiling)
            )
            try:
                timed[tiling] = graph_time(calls)
            except Exception as failure:  # too much shared memory, mostly; the default's failure shows in the table
                print(f"{tiling}: {_short(failure)}", flush=True)
        for tiling in sorted(timed, key=timed.__getitem__):
            yield {**asdict(case), **asdict(tiling), "default": tiling == default, "us": timed[tiling]}


def _report(found: dict[str, Any]) -> None:
    """Print the results as tables; attention last."""
    checks = found["checks"]
    worst = max((check["error"] for check in checks if check["ok"]), default=float("nan"))
    passed = sum(check["ok"] for check in checks)
    print(f"\n{passed} of {len(checks)} checks passed; largest error that passed {worst:.1e}")
    for (shape, rows, batch), group in _grouped(found["sweep"]).items():
        best, default = group[0], next((row for row in group if row["default"]), None)
        cut = " ".join(f"{key}={best[key]}" for key in ("tile_m", "tile_n", "splits", "warps", "stages"))
        chosen = f"{default['us']:.1f} us" if default else "failed"
        print(f"sweep {shape} R={rows} B={batch}: best {best['us']:.1f} us with {cut}; chosen {chosen}")
    print("\nfused, us     shape         rows    ours   plain")
    for row in found["fused"]:
        print(f"{row['step']:17}{row['shape']:13}{row['rows']:5}{_cell(row['ours'])}{_cell(row['plain'])}")
    print("\nattention, us: one layer; MB, share of copy bandwidth and TFLOP/s are ours; flex 'late' was not started")
    print("shape           R context  B    ours    sdpa    flex      MB  share  TF/s")
    for row in found["attention"]:
        times = "".join(_cell(row[name]) for name in ("ours", "sdpa", "flex"))
        shares = f"{row['bandwidth_share']:7.0%}{row['teraflops']:6.0f}" if row["ok"] else ""
        facts = f"{row['shape']:13}{row['rows']:4}{row['context']:8}{row['batch']:3}"
        print(f"{facts}{times}{row['bytes'] / 1e6:8.1f}{shares}")
    for row in (*found["fused"], *found["attention"]):
        if not row["ok"]:
            print("FAIL", {key: value for key, value in row.items() if key != "ok"})


def _grouped(sweep: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in sweep:
        groups.setdefault((row["shape"], row["rows"], row["batch"]), []).append(row)
    return groups


def _cell(us: float | str) -> str:
    return f"{us:8.1f}" if isinstance(us, float) else f"{us.split(':')[0][:7]:>8}"


def _short(failure: Exception) -> str:
    return f"{type(failure).__name__} {failure}".replace("\n", " ")[:160]


if __name__ == "__main__":
    sys.exit(main())
