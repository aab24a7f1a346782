"""A tiny model whose logits are far from uniform."""

import pytest
import torch

from tidar_core.model import TidarModel
from tidar_core.shapes import named_shape


@pytest.fixture(scope="session")
def model():
    """The `tiny` shape with random weights wide enough that layers matter."""
    return wide_model(named_shape("tiny"))


def wide_model(config, seed=0):
    model = TidarModel(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()
