"""A tiny model for all core tests."""

import pytest
from tiny import wide_model

from tidar_core.decoding import decode_forward, sampling
from tidar_core.kernels import PLAIN
from tidar_core.transformer.shapes import named_shape


@pytest.fixture(scope="session")
def model():
    """The `tiny` shape."""
    return wide_model(named_shape("tiny"))


@pytest.fixture
def plain_kernels(monkeypatch):
    """Decoders of plain torch: what stands in for a captured graph sees torch's operations alone."""
    monkeypatch.setattr(decode_forward, "kernels_for", lambda *of: PLAIN)
    monkeypatch.setattr(sampling, "library", lambda: None)
