"""Every strategy in a running federation: it learns, and one whose server and clients restart ends at the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator, Progress
from server_model.store import RoundState, Store
from splitfl.config import Federation, parse_federation
from splitfl.errors import LinkError
from splitfl.federation.schedule import round_step_sizes
from splitfl.federation.strategies import STRATEGIES
from splitfl.lab.federation import joined, run_together
from splitfl.lab.memory import MemoryService

CPU = torch.device("cpu")
NAMES = ("cardiology", "oncology")
ROUNDS = 3


def settings(**tables: Any) -> Federation:
    """Three rounds of four steps, tops and bottoms merged."""
    defaults: dict[str, Any] = {
        "rounds": {"count": ROUNDS, "local_steps": 4},
        "batch": {"records": 2, "max_length": 24},
        "model": {"freeze_below": 0},
        "optimizer": {"name": "sgd", "learning_rate": 0.3},
        "evaluation": {"held_out_fraction": 0.2, "records": 8, "every_rounds": 0},
    }
    merged = {name: {**defaults.get(name, {}), **table} for name, table in {**defaults, **tables}.items()}
    return parse_federation(merged, "the test")


def run(
    model: Path,
    notes: dict[str, Path],
    chosen: Federation,
    folder: Path,
    stop_after: int | None = None,
    watch: Callable[[str, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Start, or go on with, the federation in ``folder``; ends once round ``stop_after`` is durable, before any client
    hears of it. ``watch`` gets (client, event), "" for the service. Returns the clients' reports."""
    services: list[MemoryService] = []

    def report(told: Progress) -> None:
        watch("", told.event)
        if told.event == "round_durable" and told.facts["round"] == stop_after:
            services[0].fail(LinkError("stopped by the test"))

    server = folder / "server"
    coordinator = Coordinator(model, chosen, server, device=CPU, resume=server.exists(), report=report)
    coordinator.rounds.machine.present.update(NAMES)
    with MemoryService(coordinator) as service:
        services.append(service)
        jobs = {}
        for name in NAMES:
            participant = Participant(name, notes[name], ClientStore(folder / name), folder / "cache" / name, CPU)
            participant.accept = lambda _: True
            participant.report = lambda told, name=name: watch(name, told.event)
            jobs[name] = joined(service, participant, None)
        return run_together(service, jobs)


def last_round(folder: Path) -> RoundState:
    store = Store(folder / "server")
    return store.load(store.durable_rounds()[-1])


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_learns_and_a_restart_changes_no_bit(
    name: str, llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    chosen = settings(merge={"strategy": name})
    reports = run(llama, notes, chosen, tmp_path / "whole")
    for report in reports.values():
        losses = [entry["loss"] for entry in report["held_out_losses"]]
        assert losses[-1] < losses[0] - 0.05
    for stop in (0, 1):
        with pytest.raises(LinkError, match="stopped by the test"):
            run(llama, notes, chosen, tmp_path / "broken", stop_after=stop)
    run(llama, notes, chosen, tmp_path / "broken")
    whole, broken = last_round(tmp_path / "whole"), last_round(tmp_path / "broken")
    assert whole.round == ROUNDS - 1
    for part in ("trunk", "merged", "strategy"):
        assert differing(getattr(whole, part), getattr(broken, part)) == []
    remembered = {key.rpartition("/")[2] for key in whole.strategy}
    assert remembered == set(STRATEGIES[name].state_names)


TWO = {"count": 2, "local_steps": 4}  # in SCAFFOLD's first round all variates are zero


@pytest.fixture(scope="module")
def averaged(llama: Path, notes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What two rounds of plain averages merge to."""
    folder = tmp_path_factory.mktemp("fedavg")
    run(llama, notes, settings(rounds=TWO), folder)
    return last_round(folder).merged


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedavg"])
def test_strategy_is_not_fedavg(
    name: str, averaged: dict[str, Tensor], llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    strong = {"proximal_mu": 1.0} if name == "fedprox" else {}
    run(llama, notes, settings(merge={"strategy": name, **strong}, rounds=TWO), tmp_path)
    merged = last_round(tmp_path).merged
    assert any(not torch.allclose(merged[key], averaged[key], rtol=1e-3, atol=1e-5) for key in merged)


@pytest.mark.parametrize("idle_rounds", [(), (0,), (1, 2)])
def test_scaffolds_servers_variate_is_the_mean_of_those_on_the_clients_disks(
    idle_rounds: tuple[int, ...],
    llama: Path,
    notes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever tokens they have, and where one misses every step of a round."""
    train_steps = Participant._train_steps

    def idle(client: Participant, round_: int, first_step: int, tokens: int) -> int:
        missed = client.name == NAMES[0] and round_ in idle_rounds
        return 0 if missed else train_steps(client, round_, first_step, tokens)

    monkeypatch.setattr(Participant, "_train_steps", idle)
    chosen = settings(merge={"strategy": "scaffold"})
    run(llama, notes, chosen, tmp_path)
    server = last_round(tmp_path).strategy
    folder = f"snapshots/round-{ROUNDS - 1:06d}/correction.safetensors"
    own = [load_file(tmp_path / name / folder) for name in NAMES]
    assert own[0].keys() == {key.replace("/control", "/own") for key in server}
    for key, control in server.items():
        mean = torch.stack([tensors[key.replace("/control", "/own")] for tensors in own]).mean(dim=0)
        torch.testing.assert_close(control, mean, rtol=1e-3, atol=1e-5)
    assert any(control.abs().max() > 1e-3 for control in server.values())


def test_scaffolds_first_variates_are_the_mean_gradients_of_the_round(
    llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    chosen = settings(merge={"strategy": "scaffold"}, rounds={"count": 2})
    with pytest.raises(LinkError):
        run(llama, notes, chosen, tmp_path, stop_after=0)
    base, first = load_file(llama / "model.safetensors"), last_round(tmp_path)
    for name, merged in first.merged.items():
        expected = (base[name] - merged) / round_step_sizes(chosen, 0)
        torch.testing.assert_close(first.strategy[f"{name}/control"], expected, rtol=1e-4, atol=1e-6)


def test_client_that_is_too_late_keeps_the_variate_that_the_server_knows_of(
    llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    merged = Event()

    def watch(client: str, event: str) -> None:
        if (client, event) == ("", "round_durable"):
            merged.set()
        if (client, event) == ("oncology", "step"):
            merged.wait(timeout=60)

    one = {"count": 1, "local_steps": 1, "min_clients": 2, "deadline_s": 3.0}
    reports = run(llama, notes, settings(merge={"strategy": "scaffold"}, rounds=one), tmp_path, watch=watch)
    assert [reports[name]["rounds_taken"] for name in NAMES] == [1, 0]
    correction = "snapshots/round-000000/correction.safetensors"
    own = {name: load_file(tmp_path / name / correction) for name in NAMES}
    moved = {name: any(t.any() for key, t in own[name].items() if key.endswith("/own")) for name in NAMES}
    assert moved == {"cardiology": True, "oncology": False}
