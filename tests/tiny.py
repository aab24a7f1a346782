"""Tiny real objects that several tests build."""

import torch

from tidar_core.model import TidarModel


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
