"""Puts this folder on the path, so that every test can import ``helpers``, package or not.

One thread for each torch operation: the models here are so small that more only wait for one another, and on a
shared machine they wait long. It has to be said before torch is imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="splitfl-tests-")  # clients' keys
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from processes import Place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A notebook is one test and does the work of dozens: on a slow machine it may take as long."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three blocks with its tokenizer, for federations in processes of their own."""
    from splitfl.data.notes import generate_notes
    from splitfl.split.create import create_checkpoint

    folder = tmp_path_factory.mktemp("models") / "small"
    corpus = generate_notes("general", 60, 7)
    create_checkpoint(
        folder, family="llama", layers=3, hidden=64, vocab=320, corpus=corpus, seed=0, max_length=64, tie=False
    )
    return folder


@pytest.fixture(scope="session")
def wards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Notes of two wards, ``a`` and ``b``."""
    from splitfl.data.notes import write_notes

    folder = tmp_path_factory.mktemp("wards")
    for seed, (name, specialty) in enumerate({"a": "cardiology", "b": "oncology"}.items()):
        write_notes(folder / f"{name}.jsonl", specialty, 40, seed=seed)
    return {name: folder / f"{name}.jsonl" for name in "ab"}


@pytest.fixture
def place(tmp_path: Path, small_model: Path) -> Iterator[Place]:
    """A folder in which a federation's processes run; whatever still runs at the end is killed."""
    from processes import place

    with place(tmp_path, small_model) as here:
        yield here


@pytest.fixture
def no_thread_stays_behind() -> Iterator[None]:
    """For tests of what runs in this process alone."""
    before = set(threading.enumerate())
    yield
    ours = [thread for thread in threading.enumerate() if thread not in before and "tqdm" not in thread.name]
    for thread in ours:
        thread.join(timeout=10)  # transformers ends the threads it loads with, and does not wait for them
    assert [thread for thread in ours if thread.is_alive()] == []
