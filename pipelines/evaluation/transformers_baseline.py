"""Baseline: speed of transformers on the same model and prompts, and equality of its texts with ours.

How fast is the program that most people use?
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.hf_weights import save_model
from tidar_core.config import SamplingConfig
from tidar_core.planning.mode_benchmark import ModeResult

__all__ = ["against_transformers", "prompt_seconds"]


def against_transformers(
    uri: str,
    like: Tensor,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    ours: ModeResult,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Figures of greedy `generate` with its cache, one prompt at a time, with the same end tokens.

    Speeds are tokens per second over all prompts, prefills included: median and spread over `repeats`, after a warm-up.

    uri   location of the model
    like  a tensor with the dtype and the device to use
    ours  the autoregressive mode on the same prompts
    """
    theirs = _loaded(uri, like, sampling.eos_ids)

    def run(tokens: tuple[int, ...]) -> tuple[int, ...]:
        ids = torch.tensor([tokens], device=like.device)
        text = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.eos_ids) or None, pad_token_id=0,
        )  # fmt: skip
        return tuple(text[0, len(tokens) :].tolist())

    run(prompts[0])
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        texts = tuple(run(prompt) for prompt in prompts)
        speeds.append(sum(map(len, texts)) / (time.perf_counter() - began))
    speed = statistics.median(speeds)
    return {
        "tokens_per_second": speed,
        "tokens_per_second_spread": (min(speeds), max(speeds)),
        "ar_over": ours.tokens_per_second / speed,
        "equal_to_ar": texts == ours.texts,
    }


def prompt_seconds(uri: str, like: Tensor, prompts: Sequence[tuple[int, ...]], *, repeats: int) -> list[float]:
    """Seconds of a forward of each prompt with its cache and the logits of its last token; medians, after a warm-up.

    uri, like  as in `against_transformers`
    """
    theirs = _loaded(uri, like)

    @torch.inference_mode()
    def run(tokens: tuple[int, ...]) -> float:
        ids = torch.tensor([tokens], device=like.device)
        began = time.perf_counter()
        int(theirs(ids, use_cache=True, logits_to_keep=1).logits.argmax())
        return time.perf_counter() - began

    run(prompts[0])
    return [statistics.median(run(tokens) for _ in range(repeats)) for tokens in prompts]


def _loaded(uri: str, like: Tensor, end_ids: tuple[int, ...] = ()) -> Any:
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(load_bundle(uri, dtype=like.dtype).model, Path(folder), end_ids=end_ids)
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
    return theirs.to(like.device).eval()
