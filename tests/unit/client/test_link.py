"""The client's websocket shell: it says what it waits for, repeats what was lost, and leaves no request hanging."""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from client_model.journal import Head, Journal
from client_model.link import Link, SessionLostError
from splitfl.errors import LinkError, ProtocolError, RefusedError
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import (
    PROTOCOL_VERSIONS,
    Failed,
    Forward,
    Hello,
    NextRound,
    Refused,
    RoundOpen,
    StepMissed,
    TensorBytes,
    Welcome,
)
from splitfl.wire.session import CREDIT_WINDOW

WAIT_S = 20.0
Behaviour = Callable[[ServerConnection, int], None]


def welcome(*, resumed: bool, round_: int = -1) -> Welcome:
    return Welcome(PROTOCOL_VERSIONS[0], "token", resumed, "incarnation", round_, 1, 1, "{}", "ab" * 32)


def send(connection: ServerConnection, message: Any) -> None:
    connection.send(b"".join(encode(message)))


def hear(connection: ServerConnection) -> Any:
    data = connection.recv(timeout=WAIT_S)
    assert isinstance(data, bytes)
    return decode(data)


@contextmanager
def served(behave: Behaviour) -> Iterator[str]:
    """A server that does with its n-th connection what ``behave`` says."""
    count = iter(range(1000))
    server = serve(lambda connection: behave(connection, next(count)), "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()


@contextmanager
def linked(url: str, said: list[str] | None = None, patience_s: float = 30.0) -> Iterator[Link]:
    link = Link(
        url, Hello(PROTOCOL_VERSIONS, "ward"), patience_s=patience_s, say=(said if said is not None else []).append
    )
    try:
        yield link
    finally:
        link.close()


def serve_rounds(connection: ServerConnection, _: int) -> None:
    """Welcome, then answer every NextRound."""
    send(connection, welcome(resumed=hear(connection).resume != ""))
    for data in connection:
        request = decode(bytes(data))  # type: ignore[arg-type]
        assert isinstance(request, NextRound)
        send(connection, RoundOpen(request.seq, request.after + 1, ""))


def test_request_is_answered() -> None:
    with served(serve_rounds) as url, linked(url) as link:
        assert link.open().session == "token"
        assert link.ask(NextRound(0, 0, 4)) == RoundOpen(0, 5, "")
        assert link.next_seq == 1
        assert link.bytes_sent > 0
        assert link.bytes_received > 0


def test_more_requests_than_the_window_wait_for_their_turn() -> None:
    with served(serve_rounds) as url, linked(url) as link:
        link.open()
        futures = [link.request(NextRound(0, 0, number)) for number in range(3 * CREDIT_WINDOW)]
        answers = [future.result(WAIT_S) for future in futures]
        assert [answer.round for answer in answers] == list(range(1, 3 * CREDIT_WINDOW + 1))  # type: ignore[union-attr]


def test_request_that_was_lost_with_its_connection_is_repeated() -> None:
    seen: list[bytes] = []

    def behave(connection: ServerConnection, number: int) -> None:
        hello = hear(connection)
        send(connection, welcome(resumed=number > 0))
        seen.append(bytes(connection.recv(timeout=WAIT_S)))  # type: ignore[arg-type]
        if number == 0:
            connection.socket.close()
            return
        assert hello.resume == "token"
        send(connection, RoundOpen(0, 7, ""))
        connection.recv(timeout=WAIT_S)

    said: list[str] = []
    with served(behave) as url, linked(url, said) as link:
        link.open()
        assert link.request(NextRound(0, 0, 6)).result(WAIT_S) == RoundOpen(0, 7, "")
        assert f"waiting for the server at {url}" in said[0]
    assert seen[0] == seen[1]


def test_long_wait_for_the_trunk_is_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client_model.link.LONG_WAIT_S", 0.05)
    told = threading.Event()

    def behave(connection: ServerConnection, _: int) -> None:
        hear(connection)
        send(connection, welcome(resumed=False))
        hear(connection), hear(connection)
        assert told.wait(WAIT_S)
        for seq in (0, 1):
            send(connection, StepMissed(seq, 0, 0))
        connection.recv(timeout=WAIT_S)

    class Said(list[str]):
        def append(self, text: str) -> None:
            super().append(text)
            threading.Timer(0.2, told.set).start()  # time enough to say it a second time

    said = Said()
    payload = TensorBytes("f32", (1, 1, 1), bytes(4))
    with served(behave) as url, linked(url, said) as link:
        link.open()
        asked = [link.request(Forward(0, 0, 0, 0, micro, True, 1, (), payload)) for micro in (0, 1)]
        assert [type(future.result(WAIT_S)) for future in asked] == [StepMissed, StepMissed]
    (why,) = said
    assert "it may wait for another client" in why


def test_refused_request_raises_and_the_session_goes_on() -> None:
    def behave(connection: ServerConnection, _: int) -> None:
        hear(connection)
        send(connection, welcome(resumed=False))
        send(connection, Failed(hear(connection).seq, "over_limit", "too much", "Send less."))
        send(connection, RoundOpen(hear(connection).seq, 0, ""))
        connection.recv(timeout=WAIT_S)

    with served(behave) as url, linked(url) as link:
        link.open()
        with pytest.raises(RefusedError, match=r"too much\. Send less\.") as error:
            link.ask(NextRound(0, 0, -1))
        assert error.value.code == "over_limit"
        assert link.ask(NextRound(0, 0, -1)) == RoundOpen(1, 0, "")


@pytest.mark.parametrize(("code", "kind"), [("name_taken", RefusedError), ("version", ProtocolError)])
def test_refused_hello_raises(code: Any, kind: type[Exception]) -> None:
    def behave(connection: ServerConnection, _: int) -> None:
        hear(connection)
        send(connection, Refused(code, "no", "Do otherwise."))

    with served(behave) as url, linked(url) as link, pytest.raises(kind, match=r"no\. Do otherwise\."):
        link.open()


@pytest.mark.parametrize("asks_while_away", [True, False])
def test_server_that_lost_the_session_is_told_to_whoever_asks(asks_while_away: bool) -> None:
    again = threading.Event()

    def behave(connection: ServerConnection, number: int) -> None:
        hear(connection)
        send(connection, welcome(resumed=False, round_=number))
        if number == 0:
            if asks_while_away:
                connection.recv(timeout=WAIT_S)
            connection.close()
            return
        again.set()
        request = hear(connection)
        assert request.seq == 0  # a new session counts from the start
        send(connection, RoundOpen(0, 9, ""))
        connection.recv(timeout=WAIT_S)

    with served(behave) as url, linked(url) as link:
        link.open()
        if asks_while_away:
            lost = link.request(NextRound(0, 0, -1))
        else:
            again.wait(WAIT_S)
            lost = link.request(NextRound(0, 0, -1))
        with pytest.raises(SessionLostError) as error:
            lost.result(WAIT_S)
        assert error.value.welcome.round == 1
        with pytest.raises(SessionLostError):  # made by somebody who does not know yet: not for the new session
            link.request(NextRound(0, 0, 7)).result(WAIT_S)
        link.acknowledge(welcome(resumed=False, round_=0))  # an earlier loss
        with pytest.raises(SessionLostError):
            link.request(NextRound(0, 0, 7)).result(WAIT_S)
        link.acknowledge(error.value.welcome)
        assert link.request(NextRound(0, 0, 8)).result(WAIT_S) == RoundOpen(0, 9, "")


def test_server_that_stays_away_fails_what_waits_and_whatever_is_asked_later() -> None:
    def behave(connection: ServerConnection, number: int) -> None:
        if number == 0:
            hear(connection)
            send(connection, welcome(resumed=False))
            connection.recv(timeout=WAIT_S)

    with served(behave) as url, linked(url, patience_s=0.2) as link:
        link.open()
        waiting = link.request(NextRound(0, 0, -1))
        for future in (waiting, link.request(NextRound(0, 0, -1))):
            with pytest.raises(LinkError, match="has been away"):
                future.result(WAIT_S)
        with pytest.raises(LinkError, match="has been away"):
            link.request(NextRound(0, 0, -1)).result(WAIT_S)


def test_request_after_the_link_gave_up_is_told_why() -> None:
    def behave(connection: ServerConnection, _: int) -> None:
        hear(connection)
        send(connection, welcome(resumed=False))
        connection.recv(timeout=WAIT_S)
        body = b"\xff" * 40  # no header
        connection.send(body + zlib.crc32(body).to_bytes(4, "little"))

    with served(behave) as url, linked(url) as link:
        link.open()
        for _ in range(2):
            with pytest.raises(ProtocolError, match="header"):
                link.request(NextRound(0, 0, -1)).result(WAIT_S)


def test_unreachable_server_is_waited_for_and_then_given_up() -> None:
    said: list[str] = []
    with linked("ws://127.0.0.1:9", said, patience_s=0.1) as link, pytest.raises(LinkError, match="was not reached in"):
        link.open()
    assert "(Connection refused); next try in 0.5 s" in said[0]
    assert said[0].endswith("check host and port")
    assert all("waiting for the server at ws://127.0.0.1:9" in line and "next try in" in line for line in said)


@pytest.mark.parametrize("session", ["", "token"])
def test_name_that_does_not_resolve_is_waited_for_only_if_it_once_did(
    session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said: list[str] = []
    link = Link("ws://typo:7000", Hello(PROTOCOL_VERSIONS, "ward", session), patience_s=0.1, say=said.append)
    expected = r"has been away for .*\(its name does not resolve\)" if session else "no machine is known by the name in"
    with pytest.raises(LinkError, match=expected):
        link.open()
    link.close()
    assert bool(said) == bool(session)


def test_link_that_was_never_opened_can_be_closed() -> None:
    with linked("ws://127.0.0.1:9"):
        pass


def test_what_an_earlier_start_left_unanswered_leaves_once_somebody_trusts_this_server(tmp_path: Path) -> None:
    """The server says that it goes on with the session; whether it may is for the terms and the books to say."""
    journal = Journal(tmp_path / "journal", bytes(32))
    journal.begin(Head("", False, "token", 0))
    journal.sent(0, encode(NextRound(0, 0, 4)))
    heard: list[Any] = []

    def behave(connection: ServerConnection, _: int) -> None:
        heard.append(hear(connection))
        send(connection, welcome(resumed=True))
        while True:
            heard.append(hear(connection))
            send(connection, RoundOpen(heard[-1].seq, 5, ""))

    with served(behave) as url:
        again = Journal(tmp_path / "journal", bytes(32))
        link = Link(url, Hello(PROTOCOL_VERSIONS, "ward", resume="token"), journal=again, say=lambda _: None)
        link.open()
        reply = link.request(NextRound(0, 0, 5))  # what is new waits behind it
        with pytest.raises(TimeoutError):
            reply.result(timeout=0.3)
        assert [type(message) for message in heard] == [Hello]
        link.go_on()
        assert isinstance(reply.result(timeout=10), RoundOpen)
        assert [message.after for message in heard[1:]] == [4, 5]
        link.close()
