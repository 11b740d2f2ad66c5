"""What clients have released is deleted when the federation has ended, whoever is still there, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import parse_federation
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "rounds": {"count": 1, "local_steps": 2},
    "batch": {"records": 4, "max_length": 32},
    "model": {"n_bottom": 1, "n_top": 1},
    "evaluation": {"records": 4, "baselines": "none"},
}


def test_readable_activations_do_not_outlive_the_federation(
    small_model: Path, wards: dict[str, Path], tmp_path: Path
) -> None:
    chosen, state = parse_federation(SETTINGS, "the test"), tmp_path / "server"

    def kept() -> list[Path]:
        return list((state / "releases").glob("*.bin"))

    with MemoryService(Coordinator(small_model, chosen, state, device=CPU)) as service:
        stays = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "stays"))
        stays.open()  # a session that never says goodbye
        client = Participant("a", wards["a"], ClientStore(tmp_path / "a"), tmp_path / "cache", CPU)
        client.accept, client.key_file = (lambda _: True), tmp_path / "key"
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        client.run(link, link.open(), URL)
        assert kept()
        (copy,) = kept()
        left = copy.read_bytes()
    assert not kept()
    copy.write_bytes(left)  # as a server leaves them that is killed at the end
    Coordinator(small_model, chosen, state, device=CPU, resume=True).close()
    assert not kept()
