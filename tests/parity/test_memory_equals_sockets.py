"""The lab's federation in one process is the real one: the same weights, to the bit, as over websockets."""

from __future__ import annotations

from pathlib import Path

import torch

from server_model.store import Store
from splitfl.lab.federation import run_federation
from splitfl.split.cut import Cut
from tests.parity.federating import exact_settings, federate

CUTS = {"cardiology": Cut(1, 1), "oncology": Cut(0, 2), "paediatrics": Cut(2, 1)}


def test_federation_in_memory_equals_federation_over_sockets(
    llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    settings = exact_settings(
        rounds={"count": 2, "local_steps": 2, "min_clients": 3},
        model={"min_bottom": 0, "max_bottom": 2, "max_top": 2},
        wire={"codec": "bf16"},
    )
    over_sockets = Store(federate(llama, notes, settings, tmp_path / "sockets", CUTS).state).load(1)
    in_memory = run_federation(llama, notes, settings, tmp_path / "memory", cuts=CUTS).weights()
    expected = {**over_sockets.trunk, **over_sockets.merged}
    assert in_memory.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(in_memory[name], expected[name])] == []
