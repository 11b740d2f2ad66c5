"""The trunk computes with all the threads it was given, and who works beside it with one."""

from __future__ import annotations

from pathlib import Path

import torch

from server_model.coordinator import Coordinator
from server_model.threads import computing_thread
from splitfl.config import Federation


def test_each_computing_thread_has_its_own_number() -> None:
    here = torch.get_num_threads()
    one, three = computing_thread("one", 1), computing_thread("three", 3)
    assert [pool.submit(torch.get_num_threads).result() for pool in (one, three)] == [1, 3]
    assert torch.get_num_threads() == here
    computing_thread("as-before", here).shutdown()  # the last number holds for threads to come


def test_trunk_has_the_threads_and_the_codec_has_one(small_model: Path, tmp_path: Path) -> None:
    here = torch.get_num_threads()
    coordinator = Coordinator(small_model, Federation(), tmp_path / "state", device=torch.device("cpu"), threads=3)
    try:
        assert coordinator.engine._thread.submit(torch.get_num_threads).result() == 3
        assert coordinator._codec.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == here
    finally:
        coordinator.close()
        computing_thread("as-before", here).shutdown()
