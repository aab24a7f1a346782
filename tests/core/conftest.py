"""A tiny model for all core tests."""

import pytest
from tiny import wide_model

from tidar_core.transformer.shapes import named_shape


@pytest.fixture(scope="session")
def model():
    """The `tiny` shape."""
    return wide_model(named_shape("tiny"))
