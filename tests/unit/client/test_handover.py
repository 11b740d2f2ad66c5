"""A client that changes its cut: what it keeps goes on, what it takes on is the newest merge, new releases are paid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import agree
from torch import Tensor

from client_model.choices import Choices
from client_model.events import Event
from client_model.participant import Participant, PausedError
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import ConfigError, PrivacyError
from splitfl.lab.federation import hello_of
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.privacy.ledger import Ledger
from splitfl.split.create import create_checkpoint

CPU = torch.device("cpu")
ANY = {"min_bottom": 0, "max_bottom": 2, "min_top": 0, "max_top": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    texts = generate_notes("general", 60, 7)
    create_checkpoint(folder, family="llama", layers=4, hidden=64, vocab=320, corpus=texts, seed=0, tie=False)
    return folder


def settings(**tables: Any) -> Federation:
    default: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 3},
        "batch": {"records": 4, "max_length": 32},
        "model": {**ANY, "freeze_below": 0},
        "evaluation": {"records": 4, "baselines": "none"},
    }
    return parse_federation(default | tables, "the test")


class Ward:
    """One client and its server, which it may join again and again."""

    def __init__(self, service: MemoryService, folder: Path) -> None:
        self.service = service
        self.folder = folder
        write_notes(folder / "a.jsonl", "cardiology", 24, 1)

    def join(
        self, cut: Cut, watch: Callable[[Participant, Event], None] = lambda *_: None, *, rounds: int = 0
    ) -> dict[str, Any]:
        """One start with ``cut``; the report, {} when it stopped after ``rounds`` of them."""
        merged: list[int] = []

        def report(event: Event) -> None:
            if event.event == "round_durable":
                merged.append(event.facts["round"])
            watch(client, event)

        store, data = ClientStore(self.folder / "client"), self.folder / "a.jsonl"
        client = Participant("a", data, store, self.folder / "cache", CPU, report, accept=agree, plan=Choices(cut))
        client.stop = lambda: len(merged) == rounds > 0
        link = MemoryLink(self.service, hello_of("a", cut))
        with suppress(PausedError):
            try:
                return client.run(link, link.open(), URL)
            finally:
                link.close()
        return {}

    def rows(self, kind: str) -> list[Any]:
        """What the ledger says of one kind of release."""
        ledger = Ledger(self.folder / "client" / "ledger.sqlite")
        return [row for row, _, _ in ledger.rows() if row.kind == kind]


@pytest.fixture
def ward(model: Path, tmp_path: Path) -> Callable[[Federation], Any]:
    @contextmanager
    def open_ward(chosen: Federation) -> Iterator[Ward]:
        coordinator = Coordinator(model, chosen, tmp_path / "server", device=CPU)
        with MemoryService(coordinator) as service:
            yield Ward(service, tmp_path)

    return open_ward


def blocks(tensors: dict[str, Tensor]) -> set[str]:
    """Which blocks the names are of, or which other part."""
    return {name.split(".")[2] if ".layers." in name else "ends" for name in tensors}


def test_kept_blocks_keep_their_moments_and_new_ones_take_the_newest_merge_with_none(
    ward: Callable[[Federation], Any],
) -> None:
    seen: dict[str, dict[str, Tensor]] = {}

    def watch(client: Participant, event: Event) -> None:
        if event.event == "waiting" and "moments" not in seen:
            seen["moments"] = {name: moment.clone() for name, moment in client.ends.optimizer_tensors().items()}
        if event.event == "evaluation" and event.facts["round"] == 1:  # with what the round starts from
            seen["weights"] = {name: weight.clone() for name, weight in client.ends.weights().items()}

    with ward(settings()) as here:
        assert here.join(Cut(1, 1), rounds=1) == {}
        before = ClientStore(here.folder / "client").newest(0)
        report = here.join(Cut(0, 2), watch)
        merged = here.service.coordinator.rounds.store.load(0)
    kept = {name: moment for name, moment in before.optimizer.items() if ".layers.0." not in name}
    assert blocks(before.optimizer) == {"ends", "0", "3"}
    assert blocks(seen["moments"]) == {"ends", "3"}
    assert seen["moments"].keys() == kept.keys()
    assert all(torch.equal(seen["moments"][name], moment) for name, moment in kept.items())
    newest = {**merged.trunk, **merged.merged}
    assert blocks(seen["weights"]) == {"ends", "2", "3"}
    assert all(torch.equal(weight, newest[name]) for name, weight in seen["weights"].items())
    assert (report["rounds_taken"], report["starts"], report["cut"]) == (2, 2, "0,2")


def test_block_that_was_given_back_is_the_merged_copy(ward: Callable[[Federation], Any]) -> None:
    with ward(settings()) as here:
        here.join(Cut(1, 1), rounds=1)
        state = here.service.coordinator.rounds.store.load(0)
    given_back = [name for name in state.merged if ".layers.0." in name]
    assert given_back
    assert all(torch.equal(state.trunk[name], state.merged[name]) for name in given_back)


@pytest.mark.parametrize(("now", "releases"), [(Cut(2, 1), 2), (Cut(1, 2), 1)])
def test_deeper_bottom_releases_every_record_anew_and_pays_for_it(
    ward: Callable[[Federation], Any], now: Cut, releases: int
) -> None:
    chosen = settings(rounds={"count": 2, "local_steps": 12}, model=ANY, privacy={"mode": "measured", "clip_norm": 1.0})
    with ward(chosen) as here:
        here.join(Cut(1, 1), rounds=1)
        first = here.rows("activations")
        report = here.join(now)
        rows = here.rows("activations")
    times = Counter(row.record for row in rows)
    assert len(times) == report["data"]["train_records"]  # the same names in the budget, whatever the cut
    assert set(times.values()) == {releases}
    assert len({row.payload for row in rows}) == len(rows)
    assert rows[: len(first)] == first


def test_release_that_the_target_does_not_allow_does_not_leave(ward: Callable[[Federation], Any]) -> None:
    chosen = settings(
        rounds={"count": 2, "local_steps": 12},
        model={"max_bottom": 2},
        privacy={"mode": "certified", "epsilon": 8.0, "clip_norm": 1.0},
        merge={"share": "none"},
    )
    with ward(chosen) as here:
        here.join(Cut(1, 1), rounds=1)
        before = here.rows("activations")
        with pytest.raises(PrivacyError, match="budget"):
            here.join(Cut(2, 1))
        assert here.rows("activations") == before


@pytest.mark.parametrize("share", ["top", "none"])
def test_personal_bottom_cannot_change_hands_and_nothing_is_lost(ward: Callable[[Federation], Any], share: str) -> None:
    with ward(settings(model={"max_bottom": 2, "freeze_below": 0}, merge={"share": share})) as here:
        here.join(Cut(1, 1), rounds=1)
        with pytest.raises(ConfigError, match="its bottom is personal"):
            here.join(Cut(2, 1))
        assert here.join(Cut(1, 1))["rounds_taken"] == 2
