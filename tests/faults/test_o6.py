"""O6: a client or the server killed at any message and restarted comes to the undisturbed run's weights, bit for bit.

In one process the moment is exact: a client dies just before or just after a message is written down, and whatever it
had in memory is gone. ``test_client_faults.py`` kills real processes, at fewer moments.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import assert_same, final_weights
from gates import agree

from client_model.choices import Choices
from client_model.floor import Floor
from client_model.journal import Journal
from client_model.link import SessionLostError
from client_model.participant import Participant
from client_model.resuming import first_words, open_journal
from client_model.store import ClientStore, Snapshot
from server_model.coordinator import Coordinator
from server_model.members import Member
from splitfl.config import Federation, parse_federation
from splitfl.errors import LinkError
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.frames import Parts
from splitfl.wire.messages import Answer, Welcome
from splitfl.wire.session import Connected

CPU = torch.device("cpu")


def settings(**tables: Any) -> Federation:
    table: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 2, "min_clients": 2},
        "batch": {"records": 4, "micro_batches": 2, "in_flight": 2, "max_length": 16},
        "model": {"freeze_below": 0},  # the bottom trains too, so gradients come back from the trunk
        "wire": {"codec": "fp32"},
        "evaluation": {"records": 2},
    }
    return parse_federation(table | tables, "the test")


PLAIN = settings()


class DeadError(LinkError):
    """What a request of a dead process comes to."""

    def __init__(self) -> None:
        super().__init__("dead", "Nobody reads this.")


class Doomed(Journal):
    """The journal of a client that dies at message ``dies_at``: before it is written down, or after."""

    dies_at, after, seen = 0, False, 0

    def sent(self, seq: int, parts: Parts) -> None:
        self.message(lambda: super(Doomed, self).sent(seq, parts))

    def answered(self, answer: Answer, frame: bytes | memoryview) -> None:
        self.message(lambda: super(Doomed, self).answered(answer, frame))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if self.seen > self.dies_at:
            raise DeadError
        return super().once(name, make)

    def message(self, write: Callable[[], None]) -> None:
        here, self.seen = self.seen, self.seen + 1
        if here < self.dies_at or (here == self.dies_at and self.after):
            write()
        if here >= self.dies_at:
            raise DeadError


class Place:
    """A folder with a federation of two clients, ``a`` and ``b``, that can be run and disturbed."""

    def __init__(self, folder: Path, model: Path, data: Mapping[str, Path], chosen: Federation = PLAIN) -> None:
        self.folder, self.model, self.data, self.settings = folder, model, data, chosen

    def service(self, *, resume: bool = False) -> MemoryService:
        return MemoryService(Coordinator(self.model, self.settings, self.folder / "server", device=CPU, resume=resume))

    def start(self, service: MemoryService, name: str, journal: Journal | None = None) -> tuple[Participant, Link]:
        """A client as ``splitfl join`` would start it."""
        store = ClientStore(self.folder / name)
        client = Participant(name, self.data[name], store, self.folder / f"cache-{name}", CPU, accept=agree)
        journal = open_journal(store, None, Choices(), floor=repr(Floor()), url=URL) if journal is None else journal
        return client, Link(service, first_words(name, store, Choices(), journal.head, URL), journal)

    def run(self, service: MemoryService, name: str) -> None:
        client, link = self.start(service, name)
        client.run(link, link.open(), URL)

    def run_to_death(self, service: MemoryService, dies_at: int, *, after: bool) -> tuple[int, bool]:
        """Client ``a``, killed; returns how many messages it lived to see, and whether it died of the last one."""
        store = ClientStore(self.folder / "a")
        journal = open_journal(store, None, Choices(), floor=repr(Floor()), url=URL)
        journal.__class__, journal.dies_at, journal.after = Doomed, dies_at, after  # type: ignore[assignment, attr-defined]
        client, link = self.start(service, "a", journal)
        try:
            client.run(link, link.open(), URL)
        except DeadError:
            link.close()
            return journal.seen, True  # type: ignore[attr-defined]
        return journal.seen, False  # type: ignore[attr-defined]

    def run_killed(self, service: MemoryService, dies_at: int, *, after: bool) -> int:
        """Client ``a``, killed and started again; returns how many messages it lived to see."""
        seen, died = self.run_to_death(service, dies_at, after=after)
        if died:
            self.run(service, "a")
        return seen

    def whole(self) -> Path:
        """An undisturbed run; returns the server's state."""
        with self.service() as service, ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: self.run(service, name), "ab"))
        return self.folder / "server"

    def with_client_killed(self, dies_at: int, *, after: bool) -> int:
        with self.service() as service, ThreadPoolExecutor() as pool:
            other = pool.submit(self.run, service, "b")
            seen = self.run_killed(service, dies_at, after=after)
            other.result()
        return seen

    def with_server_killed(self, dies_at: int) -> int:
        """The server dies when it has received so many frames, and is started again; returns how many there were."""
        first = MortalService(self.service().coordinator, dies_at)
        with ThreadPoolExecutor() as pool:
            with first:
                links = [self.start(first, name) for name in "ab"]
                running = [pool.submit(client.run, link, link.open(), URL) for client, link in links]
                pool.submit(lambda: [client.result() for client in running] and first.ended.set())
                first.ended.wait()
                first._links.clear()  # nobody is told: the process is gone
            if first.received > dies_at:
                with self.service(resume=True) as second:
                    for _, link in links:
                        link.move(second)
                    for client in running:
                        client.result()
        return first.received


class MortalService(MemoryService):
    """A service that takes nothing and says nothing any more after ``dies_at`` frames."""

    def __init__(self, coordinator: Coordinator, dies_at: int) -> None:
        super().__init__(coordinator)
        self.dies_at, self.received = dies_at, 0
        self.ended = threading.Event()

    def send(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody hears it, as on a dead connection
            super().send(link, member, frame)

    def _receive(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        self.received += 1
        if self.received > self.dies_at:
            self._links.clear()
            self.ended.set()
        else:
            super()._receive(link, member, frame)


class Link(MemoryLink):
    """A link that can find a server again that was restarted, as the websocket link does."""

    def move(self, service: MemoryService) -> None:
        with self._lock:
            self._service = service
            self._member, frame = service.connect(self, self._counted(self._session.hello()))
            (event,) = self._session.receive(frame)
            assert isinstance(event, Connected)
            self._failure = lost = SessionLostError(event.welcome)  # before the client can ask the new server anything
        self.fail(lost)

    def acknowledge(self, welcome: Welcome) -> None:
        with self._lock:
            assert isinstance(self._failure, SessionLostError)
            assert self._failure.welcome is welcome
            self._failure = None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]) -> Path:
    return Place(tmp_path_factory.mktemp("whole"), small_model, wards).whole()


@pytest.mark.parametrize(
    ("dies_at", "after"), [(0, False), (16, True), (29, False), (44, True), (51, False), (60, True)]
)
def test_client_killed_at_a_message_changes_no_bit(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path, dies_at: int, after: bool
) -> None:
    assert Place(tmp_path, small_model, wards).with_client_killed(dies_at, after=after) > dies_at
    assert_same(final_weights(tmp_path / "server"), final_weights(whole))


@pytest.mark.parametrize("dies_at", [12, 33, 61])
def test_server_killed_at_a_message_changes_no_bit(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path, dies_at: int
) -> None:
    assert Place(tmp_path, small_model, wards).with_server_killed(dies_at) > dies_at
    assert_same(final_weights(tmp_path / "server"), final_weights(whole))


def test_client_killed_when_its_part_was_not_merged_goes_on_with_the_variate_that_the_server_knows(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"count": 2, "local_steps": 1, "min_clients": 2, "deadline_s": 1000.0}
    chosen = settings(rounds=rounds, merge={"strategy": "scaffold"}, optimizer={"name": "sgd", "learning_rate": 0.1})
    here, late, killed = Place(tmp_path, small_model, wards, chosen), threading.Event(), threading.Event()
    train_steps, take_back = Participant._train_steps, Participant._take_correction_back
    with here.service() as service, ThreadPoolExecutor() as pool:
        on_server = service.coordinator.rounds
        on_server.clock = lambda: time.monotonic() + 2000.0 * late.is_set()

        def train_late(client: Participant, round_: int, *args: int) -> int:
            if (client.name, round_) != ("a", 1):
                return train_steps(client, round_, *args)
            late.set()  # b sends its update after a step with this client
            tokens = train_steps(client, round_, *args)
            while on_server.durable < 1:
                time.sleep(0.001)
            return tokens

        def die_once(client: Participant, snapshot: Snapshot) -> None:
            if not killed.is_set():
                killed.set()
                raise DeadError
            take_back(client, snapshot)

        monkeypatch.setattr(Participant, "_train_steps", train_late)
        monkeypatch.setattr(Participant, "_take_correction_back", die_once)
        other = pool.submit(here.run, service, "b")
        client, link = here.start(service, "a")
        with pytest.raises(DeadError):
            client.run(link, link.open(), URL)
        link.close()
        here.run(service, "a")
        other.result()
    first, second = (ClientStore(tmp_path / "a").read(ClientStore.name_of(round_)).correction for round_ in (0, 1))
    assert any(own.any() for own in first.values())
    assert_same(dict(second), dict(first))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after", [False, True])
def test_client_killed_at_every_message_changes_no_bit(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path, after: bool
) -> None:
    for dies_at in range(1000):
        here = Place(tmp_path / str(dies_at), small_model, wards)
        seen = here.with_client_killed(dies_at, after=after)
        assert_same(final_weights(here.folder / "server"), final_weights(whole))
        if seen <= dies_at:  # it lived to the end
            return


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_server_killed_at_every_message_changes_no_bit(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], whole: Path
) -> None:
    for dies_at in range(1000):
        here = Place(tmp_path / str(dies_at), small_model, wards)
        seen = here.with_server_killed(dies_at)
        assert_same(final_weights(here.folder / "server"), final_weights(whole))
        if seen <= dies_at:
            return
