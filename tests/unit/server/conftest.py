"""A small model for the trunk service's own tests."""

from __future__ import annotations

import pytest
from helpers import MemorySource, tiny_model


@pytest.fixture(scope="session")
def source() -> MemorySource:
    """Weights of a six-block llama in memory."""
    return MemorySource.of(tiny_model("llama"))
