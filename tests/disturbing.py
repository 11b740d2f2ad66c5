"""A federation to be disturbed, and what it must come to all the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from processes import Command, Place, Server
from safetensors.torch import load_file
from torch import Tensor

SETTINGS = {
    "rounds": {"count": 3, "local_steps": 30, "min_clients": 2},
    "batch": {"records": 4, "max_length": 32},
    "optimizer": {"learning_rate": 2e-3},
    "wire": {"codec": "fp32"},
    "evaluation": {"records": 4},
    "trunk": {"grace_s": 30.0},
}


def final_weights(state: Path) -> dict[str, Tensor]:
    """Trunk, moments and merged weights of the newest round in a server's state folder."""
    newest = max((state / "rounds").glob("round-*"))
    return {
        f"{part}/{name}": tensor
        for part in ("trunk", "optimizer", "merged")
        for name, tensor in load_file(newest / f"{part}.safetensors").items()
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to the bit."""
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, different


def start(
    place: Place, wards: Mapping[str, Path], settings: Mapping[str, Mapping[str, object]] = SETTINGS
) -> tuple[Server, list[Command]]:
    """A server and its two clients."""
    server = place.serve(settings)
    return server, [place.join(server.url, name, data) for name, data in wards.items()]
