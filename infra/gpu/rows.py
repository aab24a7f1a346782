"""Rows of tokens from a carried corpus.

How does the carried corpus become rows of tokens?

The tokenizer is trained on every n-th training document; then all cores encode. This runs in a process of its own,
while the GPU's kernels compile.
"""

import json
import time
from pathlib import Path

import torch
from corpus import read_corpus
from torch import Tensor

from tidar_core.artifacts.text.tokenizer import Tokenizer, train_bpe
from tidar_core.training.packing import PackedRows, cut_rows
from tidar_core.transformer.shapes import named_shape

__all__ = ["SPARE_IDS", "load_rows", "prepare"]

SPARE_IDS = 64
"""Ids of the vocabulary that no text uses; the last is the mask token."""
DOCUMENTS_AT_ONCE = 2048
PREPARED = "prepared.json"


def prepare(corpus: Path, out: Path, shape: str, row_len: int, sample_mb: float) -> None:
    """Write out/tokenizer, out/train.pt, out/held_out.pt and, last, out/prepared.json with counts and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PREPARED).unlink(missing_ok=True)
    clock = _Clock()
    texts = read_corpus(corpus)
    clock.finish("read")
    tokenizer = train_bpe(_sample(texts["train"], int(sample_mb * 1e6)), named_shape(shape).vocab_size - SPARE_IDS)
    tokenizer.save(out / "tokenizer")
    clock.finish("tokenizer")
    facts: dict[str, object] = {"vocab_len": tokenizer.vocab_len}
    for split, documents in texts.items():
        tokens_T, document_len_N = _encoded(documents, tokenizer)
        rows = cut_rows(tokens_T, document_len_N, first_document=0, start=0, stop=len(tokens_T), row_len=row_len,
                        eos_id=tokenizer.eos_id)  # fmt: skip
        torch.save({"input_ids": rows.input_ids_BS, "document_ids": rows.document_ids_BS}, out / f"{split}.pt")
        characters = sum(map(len, documents))
        facts[split] = {
            "documents": len(documents),
            "characters": characters,
            "tokens": len(tokens_T),
            "rows": len(rows.input_ids_BS),
            "characters_per_token": round(characters / max(1, len(tokens_T)), 3),
        }
        clock.finish(f"encode_{split}")
    (out / PREPARED).write_text(json.dumps(facts | {"seconds": clock.seconds}, indent=2) + "\n")


def load_rows(out: Path, split: str, device: torch.device) -> PackedRows:
    """The rows that `prepare` wrote, on `device`."""
    saved = torch.load(out / f"{split}.pt")
    return PackedRows(saved["input_ids"].to(device), saved["document_ids"].to(device))


def _sample(texts: list[str], characters: int) -> list[str]:
    """Every n-th document, about `characters` in total."""
    every = max(1, round(sum(map(len, texts)) / characters))
    return texts[::every]


def _encoded(documents: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """All tokens (int32), with end of text after each document, and the length of each document."""
    pieces, lengths = [], []
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        for ids in tokenizer.encode_batch(documents[first : first + DOCUMENTS_AT_ONCE]):
            pieces.append(torch.tensor([*ids, tokenizer.eos_id], dtype=torch.int32))
            lengths.append(len(ids) + 1)
    return torch.cat(pieces), torch.tensor(lengths)


class _Clock:
    """Seconds of each part of the preparation, printed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def finish(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now
        print(f"prepare: {name} {self.seconds[name]} s", flush=True)
