"""The lab's federation in one process is the real one: the same weights as over websockets."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from server_model.store import Store
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.lab.federation import run_federation
from tests.parity.federating import exact_settings, federate

CUTS = {"cardiology": Cut(1, 1), "oncology": Cut(0, 2), "paediatrics": Cut(2, 1)}
ALLOWED = {"min_bottom": 0, "max_bottom": 2, "max_top": 2}


def both(
    model: Path, data: dict[str, Path], settings: Federation, folder: Path, cuts: dict[str, Cut] | None = None
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, in memory, over sockets) of every trained weight."""
    over_sockets = Store(federate(model, data, settings, folder / "sockets", cuts).state).load(1)
    in_memory = run_federation(model, data, settings, folder / "memory", cuts=cuts).weights()
    expected = {**over_sockets.trunk, **over_sockets.merged}
    assert in_memory.keys() == expected.keys()
    return [(name, in_memory[name], expected[name]) for name in expected]


def rounds() -> dict[str, int]:
    return {"count": 2, "local_steps": 2, "min_clients": 3}


def test_federation_in_memory_equals_sockets_to_the_bit(llama: Path, notes: dict[str, Path], tmp_path: Path) -> None:
    weights = both(llama, notes, exact_settings(rounds=rounds(), wire={"codec": "bf16"}), tmp_path)
    assert [name for name, memory, sockets in weights if not torch.equal(memory, sockets)] == []


def test_federation_of_different_cuts_in_memory_equals_sockets(
    llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    # The trunk sums the gradients of different block ranges in the order in which they come: equal but for rounding.
    # SGD, since Adam's first steps turn the rounding of a gradient near zero into a step of its own.
    optimizer = {"name": "sgd", "learning_rate": 0.5}
    for name, memory, sockets in both(
        llama, notes, exact_settings(rounds=rounds(), model=ALLOWED, optimizer=optimizer), tmp_path, CUTS
    ):
        torch.testing.assert_close(memory, sockets, rtol=0, atol=1e-5, msg=name)
