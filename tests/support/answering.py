"""A tiny model that chats, and jobs that have it answer prompts."""

import json
from dataclasses import replace
from pathlib import Path

from chat_templates import chat_tokenizer
from tiny import wide_model

from pipelines.answers.job import AnswersJob
from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.text.end_tokens import EndTokens
from tidar_core.transformer.shapes import named_shape

QUESTIONS = [f"What is {n} + {n * n}?" for n in range(12)]


def save_chat_bundle(folder, family="qwen2.5"):
    """A bundle of random weights with a chat template; every eighth token ends its texts, so that most are short."""
    tokenizer = chat_tokenizer(family)
    shape = replace(named_shape("tiny", vocab_len=tokenizer.vocab_len), tied_head=False, context_len=512)
    model = wide_model(shape)
    ends = (tokenizer.eos_id, *range(5, tokenizer.vocab_len, 8))
    generation_config = json.dumps({"eos_token_id": list(ends)})
    save_bundle(
        str(folder), model, tokenizer, block_len=4, mask_id=model.config.mask_id, objective="dual", lineage={},
        made_by={}, ends=EndTokens(ends, generation_config),
    )  # fmt: skip
    return str(folder)


def write_prompts(path, entries):
    """A file of JSON lines; a text is an entry with this `prompt`."""
    rows = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers_job(prompts, output, model, **changes):
    """A small job; keyword arguments change it."""
    small = {"max_tokens": 12, "context_len": 512, "batch": 3, "unit_prompts": 4}
    return AnswersJob(prompts=str(prompts), output=str(output), model=str(model), **(small | changes))


def conversations_of(folder):
    """The entries of an output of JSON lines, in order."""
    lines = [line for path in sorted(Path(folder).glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]
