"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Server, place
from refusals import GATHERING


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Server]:
    """A service that waits for more clients than ever come; many tests knock at it."""
    with place(tmp_path_factory.mktemp("hall"), small_model) as here:
        yield here.serve(GATHERING)
