"""The disk is full while a round is written: the round waits in memory, older ones stay whole, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import assert_same, final_weights
from gates import agree

import server_model.disk
import server_model.store
from client_model.choices import Choices
from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator, Progress
from splitfl.config import parse_federation
from splitfl.cut import Cut
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

CPU = torch.device("cpu")
SETTINGS = parse_federation(
    {
        "rounds": {"count": 2, "local_steps": 2},
        "batch": {"records": 4, "max_length": 32},
        "model": {"min_top": 1, "max_top": 2, "freeze_below": 1},  # the server merges a copy of its own as well
        "wire": {"codec": "fp32"},
        "evaluation": {"records": 0},
    },
    "the test",
)


def run(model: Path, data: Path, folder: Path, report: Callable[[Progress], None] = lambda _: None) -> None:
    """One client through a whole federation, in this process."""
    coordinator = Coordinator(model, SETTINGS, folder / "server", device=CPU, report=report)
    with MemoryService(coordinator) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a", n_bottom=1, n_top=2))
        store, own = ClientStore(folder / "a"), Choices(Cut(1, 2))
        client = Participant("a", data, store, folder / "cache", CPU, accept=agree, plan=own)
        client.run(link, link.open(), URL)


@pytest.mark.parametrize("failures", [1, 3])
def test_round_that_cannot_be_written_is_written_once_there_is_room(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    run(small_model, wards["a"], tmp_path / "whole")

    rounds = tmp_path / "server/rounds"
    left, told = [failures], []
    write = server_model.store.write_tensors

    def full_at_first(tensors: Any, path: Path) -> None:
        if left[0] and path.stem == "optimizer" and (rounds / "round-000000").exists():
            left[0] -= 1
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    def note(progress: Progress) -> None:
        if progress.event == "storage_error":
            told.append(str(progress.facts["error"]))
            assert [path.name for path in rounds.iterdir()] == ["round-000000"]  # whole, and nothing half-written

    monkeypatch.setattr(server_model.store, "write_tensors", full_at_first)
    monkeypatch.setattr(server_model.disk, "RETRY_S", 0.01)
    run(small_model, wards["a"], tmp_path, note)
    assert len(told) == failures
    assert "No space left on device" in told[0]
    assert_same(final_weights(tmp_path / "server"), final_weights(tmp_path / "whole/server"))
