"""The notary: the ledger's head goes out when it has grown, and what comes back must be signed for it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_model.link import SessionLostError
from client_model.notary import Notary
from splitfl.errors import LinkError, ProtocolError, RefusedError
from splitfl.privacy.ledger import Ledger, Row
from splitfl.privacy.witness import Mark, sign
from splitfl.wire.messages import Answer, Countersign, Countersigned, Held, Request, Welcome


@dataclass
class FakeServer:
    """Countersigns for the client ``a``, when it is told to answer."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    asked: list[Countersign] = field(default_factory=list)
    waiting: list[Future[Answer]] = field(default_factory=list)

    def request(self, message: Request) -> Future[Answer]:
        assert isinstance(message, Countersign)
        self.asked.append(message)
        self.waiting.append(Future())
        return self.waiting[-1]

    def signed(self, number: int, *, client: str = "a", key: Ed25519PrivateKey | None = None) -> Countersigned:
        mark = Mark(self.asked[number].rows, self.asked[number].head)
        return Countersigned(0, mark.count, mark.head, sign(key or self.key, client, mark))

    @property
    def signer(self) -> str:
        return self.key.public_key().public_bytes_raw().hex()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def grow(ledger: Ledger) -> None:
    ledger.append([Row(b"a", "activations", 1.0, 1.0, 0, False, bytes(32), 1)])


def notary_of(server: FakeServer, ledger: Ledger) -> Notary:
    return Notary(server, ledger, "a", server.signer)


def test_a_ledger_that_has_grown_is_countersigned_once(ledger: Ledger) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    notary.mark()
    assert server.asked == []
    grow(ledger)
    notary.mark()
    notary.mark()
    assert [(message.rows, message.head) for message in server.asked] == [(1, ledger.head.hex())]


def test_an_answer_is_not_waited_for_but_looked_at_when_it_is_there(ledger: Ledger) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    for _ in range(2):
        grow(ledger)
        notary.mark()
    server.waiting[0].set_result(server.signed(0))
    server.waiting[1].set_result(server.signed(1, client="b"))
    with pytest.raises(ProtocolError, match="countersignature is not one"):
        notary.mark()


@pytest.mark.parametrize("forged", ["another client's", "another server's", "garbled"])
def test_a_signature_that_is_none_is_refused(forged: str, ledger: Ledger) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    grow(ledger)
    notary.mark()
    answers = {
        "another client's": server.signed(0, client="b"),
        "another server's": server.signed(0, key=Ed25519PrivateKey.generate()),
        "garbled": Countersigned(0, 1, ledger.head.hex(), "zz"),
    }
    server.waiting[0].set_result(answers[forged])
    with pytest.raises(ProtocolError, match="countersignature is not one"):
        notary.settle()


def test_an_answer_of_another_kind_is_refused(ledger: Ledger) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    grow(ledger)
    notary.mark()
    server.waiting[0].set_result(Held(0, ()))
    with pytest.raises(ProtocolError, match="instead of a countersignature"):
        notary.settle()


def test_a_server_that_has_seen_a_longer_ledger_stops_the_client_and_one_that_went_away_does_not(
    ledger: Ledger,
) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    for _ in range(2):
        grow(ledger)
        notary.mark()
    server.waiting[0].set_exception(LinkError("away"))
    server.waiting[1].set_exception(RefusedError("where 7 others were countersigned", code="ledger"))
    with pytest.raises(RefusedError, match="7 others"):
        notary.settle()


def test_a_session_that_is_lost_is_said_though_only_a_countersignature_was_awaited(ledger: Ledger) -> None:
    server = FakeServer()
    notary = notary_of(server, ledger)
    grow(ledger)
    notary.mark()
    server.waiting[0].set_exception(SessionLostError(Welcome(2, "token", False, "restarted", 0, 1, 1, "{}", "ab" * 32)))
    with pytest.raises(SessionLostError):
        notary.mark()
