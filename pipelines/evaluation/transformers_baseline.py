"""Baseline: speed of transformers on the same model and prompts."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tidar_core.artifacts.model.hf_weights import save_model
from tidar_core.transformer.model import TidarModel

__all__ = ["generate_speed"]


def generate_speed(
    model: TidarModel, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, repeats: int
) -> dict[str, Any]:
    """Greedy `generate` with its cache, one prompt at a time, exactly `max_tokens` new tokens each.

    Returns tokens per second over all prompts, prefills included: median and spread over `repeats`, after a warm-up.
    """
    weight = model.embedding.weight
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        baseline: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype)
    baseline = baseline.to(weight.device).eval()

    def run(tokens: tuple[int, ...]) -> None:
        ids = torch.tensor([tokens], device=weight.device)
        baseline.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
            min_new_tokens=max_tokens, pad_token_id=0,
        )  # fmt: skip

    run(prompts[0])
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for prompt in prompts:
            run(prompt)
        speeds.append(len(prompts) * max_tokens / (time.perf_counter() - began))
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_spread": (min(speeds), max(speeds)),
    }
