"""Baseline: speed of llama.cpp with a GGUF file on the same prompts and threads."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import SamplingConfig
from tidar_core.errors import RequestError
from tidar_core.planning.mode_benchmark import ModeResult

__all__ = ["against_llama_cpp", "require_llama_cpp", "require_same_tokens"]


def require_llama_cpp(file: Path) -> Any:
    """The bindings of llama.cpp. Raises RequestError if they are not installed, or if there is no such file."""
    if not file.is_file():
        raise RequestError(f"--llama-cpp is {file}, and there is no such file; give a GGUF file")
    try:
        import xllamacpp
    except ImportError as error:
        raise RequestError(
            "--llama-cpp needs the package xllamacpp, which is not installed; run pip install xllamacpp"
        ) from error
    return xllamacpp


def require_same_tokens(file: Path, prompts: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> None:
    """Raise RequestError if a token of the prompts is another text in the file, which would get other prompts."""
    from tidar_core.artifacts.model.gguf_file import read_metadata  # it loads gguf

    tokens = read_metadata(file).get("tokenizer.ggml.tokens", [])
    for token in sorted({token for prompt in prompts for token in prompt}):
        name = tokens[token] if token < len(tokens) else None
        if name is None or tokenizer.id_of(name) != token:
            raise RequestError(
                f"--llama-cpp is {file}, whose token {token} is {name!r}, and the model's is "
                f"{tokenizer.spell(token)!r}; give a GGUF file of the same model"
            )


def against_llama_cpp(
    file: Path, prompts: Sequence[tuple[int, ...]], sampling: SamplingConfig, ours: ModeResult, *, repeats: int
) -> dict[str, Any]:
    """Figures of greedy completions, one prompt at a time, on as many threads as torch has, without a prompt cache.

    Prompts are token ids, so the file must hold the same tokens (`require_same_tokens`). A text ends at the file's
    own end tokens. Speeds are tokens per second over all prompts, prefills included: median and spread over
    `repeats`, after a warm-up.

    ours  the autoregressive mode on the same prompts
    """
    llama = require_llama_cpp(file)
    settings = llama.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = max(map(len, prompts)) + sampling.max_tokens + 1
    settings.n_parallel, settings.verbosity, settings.port = 1, -1, 0
    settings.cache_prompt, settings.cache_ram_mib, settings.ui = False, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = llama.Server(settings)
    except Exception as error:  # llama.cpp's errors have no class of their own
        raise RequestError(f"llama.cpp cannot load {file}; give a GGUF file of a language model") from error

    def run(tokens: tuple[int, ...]) -> int:
        """Number of new tokens."""
        body = {"prompt": list(tokens), "max_tokens": sampling.max_tokens, "temperature": 0.0, "cache_prompt": False}
        reply = server.handle_completions(body)
        if "usage" not in reply:
            raise RequestError(f"llama.cpp returned no text for a prompt of {len(tokens)} tokens: {reply}")
        return int(reply["usage"]["completion_tokens"])

    run(prompts[0])
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        count = sum(run(prompt) for prompt in prompts)
        speeds.append(count / (time.perf_counter() - began))
    speed = statistics.median(speeds)
    return {
        "tokens_per_second": speed,
        "tokens_per_second_spread": (min(speeds), max(speeds)),
        "ar_over": ours.tokens_per_second / speed,
        "file": file.name,
        "file_bytes": file.stat().st_size,
    }
