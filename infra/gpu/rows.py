"""How does the carried corpus become rows of tokens?

The tokenizer is trained on an even sample of the training documents; then all cores encode. In a process of its own, so
that the GPU's kernels compile meanwhile.
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
"""Rows of the vocabulary that no text uses; the last is the mask token."""
DOCUMENTS_AT_ONCE = 2048
PREPARED = "prepared.json"


def prepare(corpus: Path, out: Path, shape: str, row_len: int, sample_mb: float) -> None:
    """Write out/tokenizer, out/train.pt, out/held_out.pt and, last, out/prepared.json with counts and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PREPARED).unlink(missing_ok=True)
    clock = _Clock()
    texts = read_corpus(corpus)
    clock.lap("read")
    tokenizer = train_bpe(_sample(texts["train"], int(sample_mb * 1e6)), named_shape(shape).vocab_size - SPARE_IDS)
    tokenizer.save(out / "tokenizer")
    clock.lap("tokenizer")
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
        clock.lap(f"encode_{split}")
    (out / PREPARED).write_text(json.dumps(facts | {"seconds": clock.laps}, indent=2) + "\n")


def load_rows(out: Path, split: str, device: torch.device) -> PackedRows:
    """The rows that `prepare` wrote, on the device that trains on them."""
    saved = torch.load(out / f"{split}.pt")
    return PackedRows(saved["input_ids"].to(device), saved["document_ids"].to(device))


def _sample(texts: list[str], characters: int) -> list[str]:
    """Every n-th document, so that about so many characters come together."""
    every = max(1, round(sum(map(len, texts)) / characters))
    return texts[::every]


def _encoded(documents: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """All tokens, end of text after each document, and the length of each; int32."""
    pieces, lengths = [], []
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        for ids in tokenizer.encode_batch(documents[first : first + DOCUMENTS_AT_ONCE]):
            pieces.append(torch.tensor([*ids, tokenizer.eos_id], dtype=torch.int32))
            lengths.append(len(ids) + 1)
    return torch.cat(pieces), torch.tensor(lengths)


class _Clock:
    """Seconds from lap to lap, said aloud."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self.last, 2)
        self.last = now
        print(f"prepare: {name} {self.laps[name]} s", flush=True)
