"""A client that computes its steps in its own number of pieces comes to the weights of one that does as all do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client_model.choices import Choices
from client_model.participant import Participant
from client_model.resuming import first_words
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import parse_federation
from splitfl.lab.memory import URL, MemoryLink, MemoryService

CPU = torch.device("cpu")
SETTINGS = parse_federation(
    {
        "rounds": {"count": 2, "local_steps": 2},
        "batch": {"records": 4, "max_length": 32, "micro_batches": 2},
        "model": {"freeze_below": 0},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "wire": {"codec": "fp32", "coarsest": "int8"},
        "evaluation": {"records": 4, "baselines": "none"},
    },
    "the test",
)


def merged(model: Path, data: Path, folder: Path, own: Choices) -> Mapping[str, Tensor]:
    """The server's last merge after one client took part with its ``own`` choices."""
    with MemoryService(Coordinator(model, SETTINGS, folder / "server", device=CPU)) as service:
        store = ClientStore(folder / "a")
        client = Participant("a", data, store, folder / "cache", CPU, accept=lambda _: True, plan=own)
        client.key_file = folder / "key"
        link = MemoryLink(service, first_words("a", store, own, None, URL))
        client.run(link, link.open(), URL)
        return service.coordinator.rounds.store.load(1).merged


@pytest.mark.parametrize("own", [Choices(micro_batches=1), Choices(micro_batches=4, in_flight=3)], ids=["one", "four"])
def test_pieces_of_ones_own_make_the_same_weights(
    small_model: Path, wards: dict[str, Path], tmp_path: Path, own: Choices
) -> None:
    data = next(iter(wards.values()))
    usual, other = (merged(small_model, data, tmp_path / str(n), plan) for n, plan in enumerate((Choices(), own)))
    for name, weight in usual.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_codec_of_ones_own_is_used_both_ways(small_model: Path, wards: dict[str, Path], tmp_path: Path) -> None:
    data = next(iter(wards.values()))
    exact, coarse = (
        merged(small_model, data, tmp_path / codec, Choices(codec=codec))  # type: ignore[arg-type]
        for codec in ("fp32", "int8")
    )
    assert any(not torch.equal(exact[name], coarse[name]) for name in exact)
