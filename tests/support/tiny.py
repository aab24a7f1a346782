"""Tiny real objects that several tests build."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from tidar_core.artifacts.model import bundle as bundles
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.shards import Manifest, Split, shard_name, write_manifest, write_shard
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.config import AdapterConfig
from tidar_core.training.packing import PackedRows
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape


def wide_model(config, seed=0):
    """Random weights wide enough that layers matter and logits are about 3 apart."""
    model = TidarModel(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        model.head.weight.mul_(5)
    return model.eval()


def varied_model(tokenizer, seed=0):
    """Random weights that do not repeat their last token: the head is another table than the embedding."""
    return wide_model(replace(named_shape("tiny", vocab_len=tokenizer.vocab_len), tied_head=False), seed)


def adapted_model(
    config=None,
    *,
    rank=4,
    block_len=4,
    shifted=False,
    causal=False,
    link_reads_state=False,
    link_shares_tables=False,
    seed=0,
    **choices,
):
    """A wide model of the `tiny` shape whose draft adapter, and link if it has one, are random too.

    choices  further fields of the config
    """
    adapter = AdapterConfig(
        rank=rank, block_len=block_len, shifted=shifted, causal=causal, link_reads_state=link_reads_state,
        link_shares_tables=link_shares_tables,
    )  # fmt: skip
    config = replace(config or named_shape("tiny"), mask_id=None, adapter=adapter, **choices)
    model = wide_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("adapter.", "link.")):
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return model


def save_tiny_bundle(folder):
    """A bundle of the `tiny` shape with random weights and a tokenizer trained on this file."""
    tokenizer = train_bpe([Path(__file__).read_text()], 300)
    model = wide_model(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    mask_id = model.config.mask_id
    save_bundle(str(folder), model, tokenizer, block_len=4, mask_id=mask_id, objective="dual", lineage={}, made_by={})
    return folder


def save_lost_bundle(folder):
    """The same bundle with weights of nan, as a run that diverged once left it."""
    healthy = load_bundle(save_tiny_bundle(folder))
    for parameter in healthy.model.parameters():
        parameter.data.fill_(float("nan"))
    with patch.object(bundles, "require_finite"):
        save_bundle(
            str(folder), healthy.model, healthy.tokenizer, block_len=4, mask_id=healthy.info.mask_id, objective="dual",
            lineage={}, made_by={},
        )  # fmt: skip
    return folder


def save_tiny_shards(folder, row_len=32, seed=0):
    """24 train rows and 10 held-out ones; five in eight of them hold short documents, which give few labels."""
    tokenizer = train_bpe([Path(__file__).read_text()], 300)
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for split, count in (("train", 24), ("held_out", 10)):
        ids_BS = torch.randint(1, 300, (count, row_len), generator=generator, dtype=torch.int32)
        ids_BS[:, 1::2] = ids_BS[:, ::2]  # something to learn
        document_BS = torch.arange(count, dtype=torch.int32)[:, None] * row_len + torch.zeros_like(ids_BS)
        document_BS[torch.arange(count) % 8 < 5] += torch.arange(row_len, dtype=torch.int32) // 2
        entry = write_shard(f"{folder}/{shard_name(split, 0)}", PackedRows(ids_BS, document_BS))
        documents = len(document_BS.unique())
        splits[split] = Split(documents=documents, tokens=entry.tokens, rows=count, shards=(entry,))
    tokenizer.save(folder / "tokenizer")
    manifest = Manifest(
        row_len=row_len, eos_id=tokenizer.eos_id, vocab_len=tokenizer.vocab_len, tokenizer=tokenizer.fingerprint,
        identity=f"tiny-{seed}", splits=splits, sources=(),
    )  # fmt: skip
    write_manifest(str(folder), manifest)
    return str(folder)
