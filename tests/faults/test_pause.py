"""A client that is stopped between two steps goes on there, bit for bit. In one process: the moment is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import assert_same, final_weights
from gates import agree

from client_model.choices import Choices
from client_model.events import Event
from client_model.link import SessionLostError
from client_model.participant import Participant, PausedError
from client_model.resuming import first_words, open_journal
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

CPU = torch.device("cpu")
STEPS = 3


def settings(tables: dict[str, Any] | None = None, **evaluation: Any) -> Federation:
    table = {
        **(tables or {}),
        "rounds": {"count": 2, "local_steps": STEPS},
        "batch": {"records": 4, "max_length": 32},
        "wire": {"codec": "fp32"},
        "evaluation": {"records": 4, **evaluation},
    }
    return parse_federation(table, "the test")


@contextmanager
def service(
    model: Path, state: Path, tables: dict[str, Any] | None = None, *, resume: bool = False
) -> Iterator[MemoryService]:
    coordinator = Coordinator(model, settings(tables), state, device=CPU, resume=resume)
    with MemoryService(coordinator) as running:
        yield running


def participant(folder: Path, data: Path, report: Callable[[Event], None] = lambda _: None) -> Participant:
    return Participant("a", data, ClientStore(folder / "client"), folder / "cache", CPU, report, accept=agree)


def take_part(service: MemoryService, client: Participant) -> dict[str, Any]:
    """One start of a client with the journal of its state folder, as ``splitfl join`` makes it."""
    journal = open_journal(client.store, client.key_file, Choices(), floor=repr(client.floor), url=URL)
    link = MemoryLink(service, first_words(client.name, client.store, Choices(), journal.head, URL), journal)
    return client.run(link, link.open(), URL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]) -> Path:
    """The state of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with service(small_model, folder / "server") as running:
        take_part(running, participant(folder, wards["a"]))
    return folder / "server"


@pytest.mark.parametrize("stop_after", [(0, 0), (0, STEPS - 1), (1, 1), (1, STEPS - 1)])
def test_client_stopped_after_a_step_goes_on_at_the_next_one(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path, stop_after: tuple[int, int]
) -> None:
    with service(small_model, tmp_path / "server") as running:
        steps = stop_and_go_on(running, tmp_path, wards["a"], stop_after)
    assert steps == [(round_, step) for round_ in range(2) for step in range(STEPS)]
    assert_same(final_weights(tmp_path / "server"), final_weights(whole))


@pytest.mark.parametrize("strategy", [{"strategy": "fedprox", "proximal_mu": 1.0}, {"strategy": "scaffold"}])
def test_client_stopped_in_the_middle_of_a_round_keeps_what_its_strategy_adds(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], strategy: dict[str, Any]
) -> None:
    tables = {"merge": strategy, "optimizer": {"name": "sgd", "learning_rate": 0.3}}
    with service(small_model, tmp_path / "whole", tables) as running:
        take_part(running, participant(tmp_path / "undisturbed", wards["a"]))
    with service(small_model, tmp_path / "server", tables) as running:
        stop_and_go_on(running, tmp_path, wards["a"], (1, 0))
    assert_same(final_weights(tmp_path / "server"), final_weights(tmp_path / "whole"))


def stop_and_go_on(
    running: MemoryService, folder: Path, data: Path, stop_after: tuple[int, int]
) -> list[tuple[int, int]]:
    """Ctrl-C after that (round, step), then the same client again; returns the steps of both."""
    steps: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if event.event == "step":
            steps.append((event.facts["round"], event.facts["step"]))

    first = participant(folder, data, note)
    first.stop = lambda: bool(steps) and steps[-1] == stop_after
    with pytest.raises(PausedError):
        take_part(running, first)
    before = first.store.session()
    take_part(running, participant(folder, data, note))
    assert first.store.session() == before  # the session lived on
    return steps


def test_client_whose_server_restarts_while_it_fetches_starts_over(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path
) -> None:
    with service(small_model, tmp_path / "server") as running:
        client = participant(tmp_path, wards["a"])
        link = MemoryLink(running, Hello(PROTOCOL_VERSIONS, "a"))
        welcome = link.open()
        real, lost = link.request, [SessionLostError(welcome)]

        def request(message: Any) -> Any:
            if lost:
                raise lost.pop()
            return real(message)

        link.request = request  # type: ignore[method-assign]
        client.run(link, welcome, URL)
    assert_same(final_weights(tmp_path / "server"), final_weights(whole))


def test_client_prepares_anew_when_a_restarted_server_brings_other_settings(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    data: list[dict[str, Any]] = []
    with service(small_model, tmp_path / "server") as running:
        client = participant(tmp_path, wards["a"])
        client.report = lambda event: data.append(event.facts) if event.event == "data" else None
        link = MemoryLink(running, Hello(PROTOCOL_VERSIONS, "a"))
        welcome = link.open()
        without = replace(welcome, settings=settings(held_out_fraction=0.0).model_dump_json())
        real, lost = link.request, [SessionLostError(without)]

        def request(message: Any) -> Any:
            if lost and data:
                raise lost.pop()
            return real(message)

        link.request = request  # type: ignore[method-assign]
        client.run(link, welcome, URL)
    assert [facts["held_out_records"] > 0 for facts in data] == [True, False]
