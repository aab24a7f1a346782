"""Checks of training on this GPU: correctness and speed.

Does training work on this GPU, and how fast is it?

`smoke` runs every part once: FlexAttention against the dense oracle, compiled training against plain training, both
phases, the bundle. `mfu` times a train step by form of attention, on a published shape with random weights.
"""

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from run import Setting, fresh_model, print_line, ready_trainer, synthetic_rows
from torch import Tensor

from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.training.flex_attention import FlexAttention
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.schedule import Schedule
from tidar_core.training.trainer import Phase, Trainer
from tidar_core.transformer.attention import Attention, DenseAttention, PiecewiseAttention, attend
from tidar_core.transformer.layout import TokenLayout, causal_layout, training_layout
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["mfu", "smoke"]

FLEX_CASES = (
    ("dual", 1024, 64, 12, 4, torch.float32), ("dual", 1024, 64, 12, 4, torch.bfloat16),
    ("ar", 1024, 64, 12, 4, torch.bfloat16), ("dual", 300, 128, 12, 2, torch.bfloat16),
)  # fmt: skip
"""Mode, tokens of a row, head width, heads, key heads, dtype. The last case fills no tile (Qwen2.5-1.5B's heads)."""
FLEX_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative error in the 2-norm against the dense form in float64. It bounds rounding of product inputs, not of sums."""


def smoke(arguments: argparse.Namespace) -> None:
    """Run everything once; exit with 1 when a check fails."""
    arguments.report.mkdir(parents=True, exist_ok=True)
    setting = Setting.here(arguments.device)
    facts: dict[str, Any] = {
        "device": setting.name,
        "torch": torch.__version__,
        "measured_matmul_flops_per_second": setting.measured_peak,
    }
    print_line(
        arguments, f"{setting.name}, torch {torch.__version__}, matmul {setting.measured_peak / 1e12:.0f} TFLOP/s"
    )
    parts: list[tuple[str, Callable[[argparse.Namespace, Setting], dict[str, Any]]]] = [
        ("training", _training), ("flex", _flex_equals_dense), ("losses", _losses_equal), ("bundle", _bundle),
    ]  # fmt: skip
    failed = []
    for name, part in parts:
        try:
            facts[name] = part(arguments, setting)
            print_line(arguments, f"{name}: {json.dumps(facts[name])}")
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            facts[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        (arguments.report / "smoke.json").write_text(json.dumps(facts, indent=2) + "\n")
    print_line(arguments, f"failed: {', '.join(failed)}" if failed else "all of smoke is fine")
    if failed:
        sys.exit(1)


def mfu(arguments: argparse.Namespace) -> None:
    """Time AR and dual train steps by form of attention. A form that does not fit or run is reported as failed."""
    arguments.report.mkdir(parents=True, exist_ok=True)
    setting = Setting.here(arguments.device)
    rows = synthetic_rows(arguments.rows_per_step, arguments.row_len, named_shape(arguments.shape).vocab_size,
                          setting.device)  # fmt: skip
    model = _random_model(arguments, setting)
    table: list[dict[str, Any]] = []
    for form in arguments.forms.split(","):
        for mode in ("ar", "dual"):
            line: dict[str, Any] = {"form": form, "mode": mode}
            try:
                line |= _timed(arguments, setting, model, form, mode, rows)
            except Exception as error:  # out of memory, for example, is a finding here
                line["failed"] = f"{type(error).__name__}: {error}"[:300]
            table.append(line)
            print_line(arguments, json.dumps(line))
            torch._dynamo.reset()
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    content = {
        "device": setting.name,
        "torch": torch.__version__,
        "shape": arguments.shape,
        "row_len": arguments.row_len,
        "rows_per_step": arguments.rows_per_step,
        "rows_per_forward": arguments.rows_per_forward,
        "block_len": arguments.block_len,
        "peak_flops_per_second": setting.peak,
        "measured_matmul_flops_per_second": setting.measured_peak,
        "steps": table,
    }
    (arguments.report / f"mfu-{arguments.shape}.json").write_text(json.dumps(content, indent=2) + "\n")


def _timed(arguments: argparse.Namespace, setting: Setting, model: TidarModel, form: str, mode: str,
           rows: Any) -> dict[str, Any]:  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = None
    attention = {
        "flex": FlexAttention,
        "sdpa": _Sdpa,
        "split": lambda layout: PiecewiseAttention(layout, setting.dtype),
    }[form]
    trainer = Trainer(
        model, block_len=arguments.block_len, compiled=setting.device.type == "cuda" and not arguments.eager,
        attention=attention,
    )  # fmt: skip
    phase = _steps(arguments, mode == "dual", arguments.steps)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.warm_up(phase, rows)
    trainer.train(replace(phase, steps=1), rows, lambda _: None)
    progress = trainer.train(phase, rows, lambda _: None)
    memory = torch.cuda.max_memory_allocated() / 2**30 if setting.device.type == "cuda" else None
    return {
        "seconds_per_step": progress.seconds / progress.steps,
        "tokens_per_second": progress.tokens_per_second,
        "mfu": progress.flops_per_second / setting.peak,
        "mfu_of_measured_peak": progress.flops_per_second / setting.measured_peak,
        "memory_gib": memory,
    }


def _random_model(arguments: argparse.Namespace, setting: Setting) -> TidarModel:
    """Random weights, drawn on the device: drawing a large shape on the CPU takes long."""
    torch.manual_seed(arguments.seed)
    with setting.device:
        model = TidarModel(named_shape(arguments.shape)).to(setting.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


class _Sdpa:
    """Attention of all tokens to all tokens in one fused call. Key heads are repeated, as masked SDPA requires."""

    def __init__(self, layout: TokenLayout) -> None:
        self.visible_BLL = DenseAttention(layout).visible_BLL

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        repeat = q_BLHD.shape[2] // k_BLHD.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return attend(q, k, v, self.visible_BLL).transpose(1, 2)


def _training(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Both phases for a few train steps at the real size, with the projected tokens of a run of 400 s."""
    config = named_shape(arguments.shape)
    rows = synthetic_rows(4 * arguments.rows_per_step, arguments.row_len, config.vocab_size, setting.device)
    phases = {name: _steps(arguments, name == "dual", arguments.steps) for name in ("ar", "dual")}
    trainer, form = ready_trainer(arguments, setting, phases, rows)
    facts: dict[str, Any] = {"form": form}
    for name, phase in phases.items():
        progress = trainer.train(phase, rows, lambda _: None)
        trainer.evaluate(rows, rows_per_forward=arguments.rows_per_forward)
        assert (progress.losses.ar_loss or 0) < 12, f"the AR loss is {progress.losses.ar_loss}"
        facts[name] = {
            "ar_loss": progress.losses.ar_loss,
            "diffusion_loss": progress.losses.diffusion_loss,
            "tokens_per_second": progress.tokens_per_second,
            "mfu": progress.flops_per_second / setting.peak,
            "mfu_of_measured_peak": progress.flops_per_second / setting.measured_peak,
            "projected_tokens": progress.tokens_per_second * 400 * (0.45 if name == "ar" else 0.55),
        }
    if setting.device.type == "cuda":
        facts["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return facts


def _flex_equals_dense(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Relative errors of FlexAttention, forward and backward, against the dense form in float64 on random layouts."""
    if setting.device.type != "cuda":
        return {"skipped": "FlexAttention has no backward pass on a CPU"}
    errors = {}
    for mode, row_len, head_size, heads, kv_heads, dtype in FLEX_CASES:
        documents = synthetic_rows(2, row_len, 1000, setting.device).document_ids_BS.long()
        documents[-1, row_len - 37 :] = -1  # padding
        layout = causal_layout(documents) if mode == "ar" else training_layout(documents, arguments.block_len)
        generator = torch.Generator(setting.device).manual_seed(row_len)
        q, k, v, weight = (
            torch.randn(*layout.position.shape, n, head_size, generator=generator, device=setting.device, dtype=dtype)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        weight = weight * (layout.document >= 0)[..., None, None]  # the output at padding is undefined
        ours = _with_gradients(FlexAttention(layout), (q, k, v), weight)
        exact = _with_gradients(_Sdpa(layout), tuple(x.double() for x in (q, k, v)), weight.double())
        name = f"{mode} S={row_len} D={head_size} {str(dtype).removeprefix('torch.')}"
        errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact)]
        assert max(errors[name]) < FLEX_TOLERANCE[dtype], f"{name}: relative errors {errors[name]}"
    return errors


def _with_gradients(attention: Attention, inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = attention(0, *leaves) * (weight != 0)
    (output * weight).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _losses_equal(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Losses of the compiled objective on the device and of the plain fp32 objective on the CPU, with equal weights."""
    shape = replace(named_shape(arguments.shape), layers=2)
    plain = TidarModel(shape)
    plain.init_weights(1)
    there = TidarModel(shape).to(setting.device, setting.dtype)
    there.load_state_dict(plain.state_dict())
    rows = synthetic_rows(2, arguments.row_len, shape.vocab_size, torch.device("cpu"))
    found = {}
    for dual in (False, True):
        values = []
        for model in (plain, there):
            objective = Objective(model, dual=dual, block_len=arguments.block_len)
            if model is there and setting.device.type == "cuda" and not arguments.eager:
                objective.compile_parts()
            device = model.embedding.weight.device
            batch = objective.batch(rows.input_ids_BS.long().to(device), rows.document_ids_BS.long().to(device))
            model.zero_grad()
            loss = dual_mode_loss(objective(batch), 1.0, *label_counts(batch))
            loss.backward()
            gradient = model.layers[0].attention.qkv.weight.grad.float().cpu()
            values.append((loss.item(), gradient))
        (exact, exact_gradient), (ours, gradient) = values
        error = float((gradient - exact_gradient).norm() / exact_gradient.norm())
        found["dual" if dual else "ar"] = {"cpu_fp32": exact, "device": ours, "gradient_error": error}
        assert abs(ours - exact) < 5e-3 * exact, found
        assert error < 0.1, found  # bf16 through two layers and a softmax of 16,384
    return found


def _bundle(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Save a bundle, load it, and compare the weights. Returns its size in bytes."""
    tokenizer = train_bpe([Path(__file__).read_text()], 300)
    model = fresh_model(arguments, setting)
    mask_id = model.config.mask_id
    assert mask_id is not None
    where = arguments.out / "bundle"
    save_bundle(str(where), model, tokenizer, block_len=arguments.block_len, mask_id=mask_id, objective="dual",
                lineage={}, made_by={})  # fmt: skip
    loaded = load_bundle(where, dtype=setting.dtype, device=setting.device).model
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in model.named_parameters())
    return {"bytes": sum(path.stat().st_size for path in where.iterdir())}


def _steps(arguments: argparse.Namespace, dual: bool, steps: int) -> Phase:
    return Phase(
        dual=dual, schedule=Schedule(peak=3e-4, minimum=3e-5, warmup=0.1), steps=steps, report_every=steps,
        rows_per_step=arguments.rows_per_step, rows_per_forward=arguments.rows_per_forward,
    )  # fmt: skip
