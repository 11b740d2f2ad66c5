"""What the lab's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfl.data.notes import generate_notes
from splitfl.split.create import create_checkpoint


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three blocks, hidden 64, 300 words."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    corpus = generate_notes("general", 60, 0)
    create_checkpoint(folder, family="llama", layers=3, hidden=64, vocab=300, corpus=corpus, seed=0)
    return folder
