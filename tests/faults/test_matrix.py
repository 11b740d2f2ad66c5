"""Every kind of fault to every kind of message of a round: the federation ends, with the weights of an undisturbed run.

Over real websockets, in one process. Bit for bit, for the cohort is fixed and there is no deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import assert_same, final_weights
from gates import agree
from proxy import Meddler
from serving import ServiceThread
from torch import Tensor

from client_model.link import Link
from client_model.participant import Participant
from client_model.store import ClientStore
from splitfl.config import parse_federation
from splitfl.wire.messages import (
    PROTOCOL_VERSIONS,
    Backward,
    Forward,
    Gradient,
    Hello,
    Hidden,
    RoundDurable,
    RoundOpen,
    Update,
    Upload,
)

SETTINGS = parse_federation(
    {
        "rounds": {"count": 2, "local_steps": 2, "min_clients": 2},
        "batch": {"records": 4, "micro_batches": 2, "max_length": 32},
        "model": {"freeze_below": 0},  # so that gradients travel all the way down
        "wire": {"codec": "fp32"},
        "evaluation": {"records": 0},
    },
    "the test",
)
CPU = torch.device("cpu")
MESSAGES = {
    "round open": (RoundOpen, 2),
    "step: forward": (Forward, 3),
    "step: hidden": (Hidden, 3),
    "step: backward": (Backward, 4),
    "step: gradient": (Gradient, 4),
    "update: upload": (Upload, 1),
    "update": (Update, 1),
    "merged": (RoundDurable, 1),
}


def take_part(name: str, data: Path, url: str, folder: Path, said: list[str]) -> dict[str, Any]:
    """One client from Hello to its report."""
    link = Link(url, Hello(PROTOCOL_VERSIONS, name), say=said.append)
    store = ClientStore(folder / f"client-{name}")
    try:
        return Participant(name, data, store, folder / "cache" / name, CPU, accept=agree).run(link, link.open(), url)
    finally:
        link.close()


def federate(
    service: ServiceThread, wards: Mapping[str, Path], folder: Path, urls: Mapping[str, str], said: list[str]
) -> None:
    with ThreadPoolExecutor(len(wards)) as pool:
        jobs = [
            pool.submit(take_part, name, path, urls.get(name, service.url), folder, said)
            for name, path in wards.items()
        ]
        for job in jobs:
            assert job.result(timeout=60)["rounds_taken"] == SETTINGS.rounds.count


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]) -> dict[str, Tensor]:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with ServiceThread(small_model, SETTINGS, folder / "server") as service:
        federate(service, wards, folder, {}, [])
    return final_weights(folder / "server")


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("fault", ["drop", "delay", "corrupt", "duplicate"])
def test_fault_changes_no_bit(
    small_model: Path,
    wards: dict[str, Path],
    tmp_path: Path,
    expected: dict[str, Tensor],
    fault: str,
    message: str,
) -> None:
    kind, nth = MESSAGES[message]
    said: list[str] = []
    with (
        ServiceThread(small_model, SETTINGS, tmp_path / "server") as service,
        Meddler(service.url, kind, fault, nth) as meddler,
    ):
        federate(service, wards, tmp_path, {"a": meddler.url}, said)
        assert meddler.hits == 1
        assert meddler.connections == (2 if fault in ("drop", "corrupt") else 1)
        assert [event["client"] for event in service.named("connected", resumed=True)] == ["a"] * (
            meddler.connections - 1
        )
    assert any("damaged on the way" in line for line in said) == (fault == "corrupt")
    assert_same(final_weights(tmp_path / "server"), expected)
