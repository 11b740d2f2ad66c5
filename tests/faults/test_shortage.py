"""Memory that runs out, wherever in a step: the client halves its pieces, goes on in the round, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client_model.choices import Choices
from client_model.ends import Ends
from client_model.floor import Floor
from client_model.participant import Participant
from client_model.resuming import first_words, open_journal
from client_model.shortage import ShortageError
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.errors import SplitFLError
from splitfl.lab.memory import URL, MemoryLink, MemoryService

CPU = torch.device("cpu")
NOT_ENOUGH = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."
PRIVATE = {"mode": "measured", "clip_norm": 1.0, "gradients": "noised"}


def settings(n_bottom: int, **tables: Any) -> Federation:
    default: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 3},
        "batch": {"records": 4, "max_length": 32},
        "model": {"n_bottom": n_bottom, "n_top": 3 - n_bottom if n_bottom == 0 else 1, "freeze_below": 0},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "evaluation": {"records": 4, "baselines": "none"},
    }
    return parse_federation(default | tables, "the test")


class Starved:
    """An end that has memory for so many rows at once; ``method`` of it fails, after it has done half of the harm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, most_rows: int, first_call: int) -> None:
        self.calls = self.failures = 0
        real: Callable[..., Any] = getattr(Ends, method)

        def fails(ends: Ends, first: Tensor, *rest: Any, **options: Any) -> Any:
            result = real(ends, first, *rest, **options)
            self.calls += 1
            if len(first) > most_rows and self.calls > first_call:
                self.failures += 1
                raise RuntimeError(NOT_ENOUGH)  # the gradients are there, and must not count
            return result

        monkeypatch.setattr(Ends, method, fails)


def take_part(model: Path, data: Path, folder: Path, chosen: Federation) -> tuple[Mapping[str, Tensor], Participant]:
    """One client to its end, started again in its process as ``splitfl join`` does; the server's last merge."""
    with MemoryService(Coordinator(model, chosen, folder / "server", device=CPU)) as service:
        client = Participant("a", data, ClientStore(folder / "a"), folder / "cache", CPU, accept=lambda _: True)
        client.key_file, client.simulated, client.noise_seed = folder / "key", True, 1
        while True:
            journal = open_journal(client.store, client.key_file, Choices(), floor=repr(Floor()), url=URL)
            link = MemoryLink(service, first_words("a", client.store, Choices(), journal.head, URL), journal)
            try:
                client.run(link, link.open(), URL)
            except ShortageError:
                link.close()
                if client.exhausted:
                    raise
            else:
                return service.coordinator.rounds.store.load(1).merged, client


@pytest.mark.parametrize("n_bottom", [0, 1], ids=["empty trunk", "trunk"])
@pytest.mark.parametrize("method", ["_run_bottom", "_run_top"])
@pytest.mark.parametrize("first_call", [1, 4])
def test_round_ends_with_the_weights_of_an_undisturbed_one(
    small_model: Path,
    wards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_bottom: int,
    method: str,
    first_call: int,
) -> None:
    data, chosen = next(iter(wards.values())), settings(n_bottom)
    whole, _ = take_part(small_model, data, tmp_path / "whole", chosen)
    starved = Starved(monkeypatch, method, most_rows=1, first_call=first_call)
    merged, client = take_part(small_model, data, tmp_path / "starved", chosen)
    assert (starved.failures, client.row_pieces) == (2, 4)
    assert merged.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=2e-5)  # Adam magnifies rounding


def test_nothing_is_released_twice(
    small_model: Path, wards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, chosen = next(iter(wards.values())), settings(1, model={"n_bottom": 1, "n_top": 1}, privacy=PRIVATE)
    _, whole = take_part(small_model, data, tmp_path / "whole", chosen)
    Starved(monkeypatch, "_run_top", most_rows=2, first_call=3)
    _, starved = take_part(small_model, data, tmp_path / "starved", chosen)
    ledgers = [client.guard.ledger for client in (whole, starved) if client.guard is not None]
    assert starved.row_pieces == 2
    assert [row.kind for row, _, _ in ledgers[0].rows()] == [row.kind for row, _, _ in ledgers[1].rows()]


def test_client_that_has_no_memory_for_one_record_says_so(
    small_model: Path, wards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Starved(monkeypatch, "_run_top", most_rows=0, first_call=0)
    with pytest.raises(SplitFLError, match="one record at a time too"):
        take_part(small_model, next(iter(wards.values())), tmp_path, settings(1))


def test_other_errors_are_not_taken_for_a_shortage(
    small_model: Path, wards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Ends, "_run_top", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        take_part(small_model, next(iter(wards.values())), tmp_path, settings(1))
