"""Tiny real objects that several tests build."""

from pathlib import Path

import torch

from tidar_core.artifacts.bundle import save_bundle
from tidar_core.artifacts.tokenizer import train_bpe
from tidar_core.model import TidarModel
from tidar_core.shapes import named_shape


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


def save_tiny_bundle(folder):
    """A bundle of the `tiny` shape with random weights and a tokenizer trained on this file."""
    tokenizer = train_bpe([Path(__file__).read_text()], 300)
    model = wide_model(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    mask_id = model.config.mask_id
    save_bundle(str(folder), model, tokenizer, block_len=4, mask_id=mask_id, objective="dual", lineage={}, made_by={})
    return folder
