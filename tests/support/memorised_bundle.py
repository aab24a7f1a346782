"""A tiny model that has learned a few facts by heart, so that its scores on tasks about them are known."""

import json
from pathlib import Path

import torch

from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

SUMS = [(a, b) for a in (1, 2, 3) for b in (4, 5, 6, 7)]
PLACES = {"Paris": "France", "Rome": "Italy", "Cairo": "Egypt", "Lima": "Peru"}
FUNCTIONS = {"one": 1, "two": 2, "six": 6}
STEPS = 300

SUM_TEXTS = [f"Q: {a}+{b}?\nA: The answer is {a + b}.\n\nQ:" for a, b in SUMS]
PLACE_TEXTS = [f"{city} is in {country}\n" for city, country in PLACES.items()]
FUNCTION_TEXTS = [f"def {name}():\n    return {value}\n" for name, value in FUNCTIONS.items()]


def save_scholar(folder):
    """A dual-mode bundle that continues the texts above by heart, K = 4."""
    texts = SUM_TEXTS + PLACE_TEXTS + FUNCTION_TEXTS
    tokenizer = train_bpe(texts, 300)
    model = TidarModel(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    model.init_weights(0)
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_id] * (length - len(row)) for row in rows])
    documents = torch.tensor([[0] * len(row) + [-1] * (length - len(row)) for row in rows])
    objective = Objective(model, dual=True, block_len=4)
    batch = objective.batch(ids, documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        loss = dual_mode_loss(objective(batch), 1.0, *label_counts(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_bundle(str(folder), model.eval(), tokenizer, block_len=4, mask_id=model.config.mask_id, objective="dual",
                lineage={}, made_by={})  # fmt: skip
    return str(folder)


def write_lines(path, rows):
    """A JSONL file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_task(folder, name, text):
    """An lm-eval task of one's own."""
    path = Path(folder) / f"{name}.yaml"
    path.write_text(f"task: {name}\ntest_split: test\n{text}")
    return str(path)
