"""Small checkpoints and data sets for the oracles."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfl.data.notes import generate_notes, write_notes
from splitfl.split.create import create_checkpoint

HOSPITALS = ("cardiology", "oncology", "paediatrics")


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file of notes for each of three hospitals."""
    folder = tmp_path_factory.mktemp("notes")
    for number, specialty in enumerate(HOSPITALS):
        write_notes(folder / f"{specialty}.jsonl", specialty, 40, seed=number)
    return {specialty: folder / f"{specialty}.jsonl" for specialty in HOSPITALS}


def make_checkpoint(folder: Path, family: str, *, tie: bool | None = None, layers: int = 5) -> Path:
    """A tiny checkpoint of ``family`` with its own tokenizer."""
    create_checkpoint(
        folder,
        family=family,
        layers=layers,
        hidden=64,
        vocab=400,
        corpus=generate_notes("general", 60, 7),
        seed=3,
        max_length=64,
        tie=tie,
    )
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "llama", tie=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")
