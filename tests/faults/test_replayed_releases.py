"""A private client that dies between a draw and its answer: what was drawn leaves as it was drawn, or never.

Sending the same noised bytes again is free; a second draw of what has left would cancel its noise, uncharged. In one
process, as in ``test_o6.py``, so that the moment of death is exact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from test_o6 import DeadError, Place, settings

from client_model.choices import Choices
from client_model.floor import Floor
from client_model.journal import Journal
from client_model.resuming import open_journal
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from server_model.members import Member
from splitfl.codec.tensors import by_record
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.once import digest
from splitfl.wire.frames import Parts, decode
from splitfl.wire.messages import Answer, Backward, Forward, Release, Request, TensorBytes

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "frozen bottom": {"model": {}, "privacy": {"mode": "measured", "gradients": "noised"}},
    "bottom trains": {"model": {"freeze_below": 0}, "privacy": {"mode": "measured", "gradients": "noised"}},
    "dp_sgd": {"model": {}, "privacy": {"mode": "measured", "gradients": "noised", "dp_sgd": True}},
}
CARRYING = {"frozen bottom": Release, "bottom trains": Forward, "dp_sgd": Release}  # activations, by mode
TENSORS = ("activations", "activations of held-out records", "gradients")
MOMENTS = ("drawn", "written down", "sent")

What = tuple[object, ...]  # what a tensor is of: its kind and place, or its record's name


class Doomed(Journal):
    """The journal of a client that dies at its ``number``-th request of a ``kind``: when it is drawn, when it is
    written down, or when its answer comes. ``written`` is all that was written down, ``unwritten`` what it died at."""

    kind: type[Request]
    number: int
    moment: str
    written: list[bytes]
    unwritten: tuple[bytes, ...] = ()
    dead = False

    def sent(self, seq: int, parts: Parts) -> None:
        self.check_alive()
        frame = b"".join(parts)
        self.number -= isinstance(decode(frame), self.kind)
        here = self.number < 0
        if here and self.moment == "drawn":
            self.unwritten = (frame,)
            self.die()
        super().sent(seq, parts)
        self.written.append(frame)
        if here and self.moment == "written down":
            self.die()

    def answered(self, answer: Answer, frame: bytes | memoryview) -> None:
        if self.number < 0:
            self.die()
        self.check_alive()
        super().answered(answer, frame)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        self.check_alive()
        return super().once(name, make)

    def die(self) -> None:
        self.dead = True
        raise DeadError

    def check_alive(self) -> None:
        if self.dead:
            raise DeadError


class Listening(MemoryService):
    """A service that remembers every frame that came."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator)
        self.received: list[bytes] = []

    def _receive(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        self.received.append(frame)
        super()._receive(link, member, frame)


def noised(frame: bytes) -> list[tuple[What, TensorBytes]]:
    """The noised tensors of a request, each with what it is of."""
    message = decode(frame)
    if isinstance(message, Release):
        return [
            (("activation", name), one) for name, one in zip(message.records, by_record(message.hidden), strict=True)
        ]
    if isinstance(message, Backward):
        return [(("gradient", message.round, message.step, message.micro), message.gradient)]
    if isinstance(message, Forward) and message.hidden is not None:
        return [(("forward", message.train, message.round, message.step, message.micro), message.hidden)]
    return []


def run_killed(place: Place, kind: type[Request], number: int, moment: str) -> tuple[Doomed, list[bytes]]:
    """Client ``a`` dies and is started again: the journal that died, and all that the server got."""
    journal = open_journal(ClientStore(place.folder / "a"), None, Choices(), floor=repr(Floor()), url=URL)
    journal.__class__ = Doomed
    assert isinstance(journal, Doomed)
    journal.kind, journal.number, journal.moment, journal.written = kind, number, moment, []
    with Listening(place.service().coordinator) as service:
        client, link = place.start(service, "a", journal)
        with pytest.raises(DeadError):
            client.run(link, link.open(), URL)
        link.close()
        assert client.guard is not None
        client.guard.close()
        place.run(service, "a")
    return journal, service.received


def draws(frames: Iterable[bytes]) -> dict[What, set[bytes]]:
    """The different bytes of each noised tensor."""
    found: defaultdict[What, set[bytes]] = defaultdict(set)
    for what, payload in chain.from_iterable(map(noised, frames)):
        found[what].add(bytes(payload.data))
    return found


def records_in(frames: Iterable[bytes]) -> set[bytes]:
    """Digests of the noised tensors of single records, as the ledger has them."""
    return {
        digest(one)
        for what, payload in chain.from_iterable(map(noised, frames))
        for one in ([payload] if what[0] == "activation" else by_record(payload))
    }


def paid(state: Path) -> Counter[bytes]:
    """How often each noised tensor was paid for."""
    ledger = Ledger(state / "ledger.sqlite")
    tensors = [row for row, _, _ in ledger.rows() if row.kind in TENSORS]
    ledger.close()
    return Counter(row.payload for row in tensors)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("what", ["activation", "gradient"])
@pytest.mark.parametrize("mode", MODES)
def test_killed_client_sends_what_it_had_drawn_and_draws_nothing_twice(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], mode: str, what: str, moment: str
) -> None:
    chosen = settings(rounds={"count": 1, "local_steps": 2}, **MODES[mode])
    place = Place(tmp_path, small_model, wards, chosen)
    kind = Backward if what == "gradient" else CARRYING[mode]
    died, received = run_killed(place, kind, 2, moment)
    rows, all_left = paid(tmp_path / "a"), records_in([*received, *died.unwritten])
    assert rows.keys() >= all_left
    assert set(rows.values()) == {1}
    if mode != "dp_sgd":  # while an answer comes, one more micro-batch of two records may be drawn, and is lost
        assert len(rows.keys() - all_left) <= (2 if moment == "sent" else 0)
    replayed = [*died.written, *died.unwritten] if kind is Release else died.written  # activations lie in the vault
    before, left = draws(replayed), draws(received)
    if mode == "dp_sgd":  # it starts the round anew, with other noise in its weights: other gradients, and paid for
        before, left = ({name: made for name, made in each.items() if "activation" in name} for each in (before, left))
    assert before
    assert {name: len(payloads) for name, payloads in left.items()} == dict.fromkeys(left, 1)
    assert {name: left[name] for name in before} == before
    if kind is not Release:  # what was drawn and not written down never leaves
        assert not {bytes(p.data) for f in died.unwritten for _, p in noised(f)} & set().union(*left.values())
