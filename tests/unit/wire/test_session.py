"""Client and server session back to back, without sockets: lost connections lose and repeat nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitfl.errors import ProtocolError
from splitfl.wire.frames import Parts, decode, encode
from splitfl.wire.messages import (
    ANSWERS,
    MESSAGE_TYPES,
    PROTOCOL_VERSIONS,
    REQUESTS,
    Answer,
    Hello,
    Message,
    NextRound,
    Refused,
    Request,
    RoundOpen,
    TensorBytes,
    Welcome,
)
from splitfl.wire.session import (
    CREDIT_WINDOW,
    Answered,
    ClientSession,
    Connected,
    Rejected,
    ServerSession,
    choose_version,
)

HASH = "ab" * 32


def joined(parts: Parts) -> bytes:
    return b"".join(parts)


def welcome(*, resumed: bool, session: str = "token", version: int = PROTOCOL_VERSIONS[0]) -> bytes:
    return joined(encode(Welcome(version, session, resumed, "incarnation", -1, 1, 1, "{}", HASH)))


def connected() -> tuple[ClientSession, ServerSession]:
    """Both sides just after their first Hello and Welcome."""
    client, server = ClientSession(Hello(PROTOCOL_VERSIONS, "ward-a")), ServerSession()
    client.receive(welcome(resumed=False))
    return client, server


def ask(client: ClientSession, after: int = 0) -> bytes:
    return joined(client.request(NextRound(0, 0, after))[1])


def take(server: ServerSession, data: bytes) -> Request:
    """Let the server receive a request that is new to it."""
    request, repeated = server.receive(data)
    assert request is not None
    assert repeated is None
    return request


def reply(server: ServerSession, seq: int) -> bytes:
    return joined(server.answer(RoundOpen(seq, seq, "")))


def answered(client: ClientSession, data: bytes) -> list[Answer]:
    events = client.receive(data)
    assert all(isinstance(event, Answered) for event in events)
    return [event.answer for event in events if isinstance(event, Answered)]


def resend(client: ClientSession) -> list[bytes]:
    """Resume on a new connection; returns the frames that the client sends again."""
    client.receive(welcome(resumed=True))
    return [joined(parts) for parts in client.unanswered()]


# asking and answering


def test_client_hears_each_answer_once() -> None:
    client, server = connected()
    request = take(server, ask(client, after=5))
    assert request == NextRound(0, 0, 5)
    frame = reply(server, 0)
    assert answered(client, frame) == [RoundOpen(0, 0, "")]
    assert answered(client, frame) == []
    assert client.unanswered() == []


def test_client_numbers_its_requests_from_zero() -> None:
    client, server = connected()
    assert [take(server, ask(client)).seq for _ in range(5)] == [0, 1, 2, 3, 4]
    assert client.next_seq == 5


def test_client_acknowledges_what_is_answered_without_a_gap() -> None:
    client, server = connected()
    for _ in range(4):
        take(server, ask(client))
    for seq, ack in ((2, 0), (0, 1), (3, 1), (1, 4)):
        assert answered(client, reply(server, seq))
        assert take(server, ask(client)).ack == ack


def test_client_goes_on_with_a_paused_session() -> None:
    client, server = connected()
    for seq in range(3):
        take(server, ask(client))
        answered(client, reply(server, seq))
    later = ClientSession(Hello(PROTOCOL_VERSIONS, "ward-a", resume="token"), next_seq=client.next_seq)
    later.receive(welcome(resumed=True))
    request = take(server, ask(later))
    assert (request.seq, request.ack) == (3, 3)
    assert server.unacknowledged == 0
    assert answered(later, reply(server, 3)) == [RoundOpen(3, 3, "")]


def test_client_reports_a_refusal() -> None:
    client, _ = connected()
    refusal = Refused("internal", "the federation has ended")
    assert client.receive(joined(encode(refusal))) == [Rejected(refusal)]


def test_server_keeps_an_answer_until_it_is_acknowledged() -> None:
    client, server = connected()
    first = ask(client)
    take(server, first)
    frame = reply(server, 0)
    assert server.unacknowledged == 1
    assert joined(server.receive(first)[1] or []) == frame
    answered(client, frame)
    take(server, ask(client))
    assert server.unacknowledged == 0
    assert server.receive(first) == (None, None)


# lost connections


def test_client_repeats_byte_for_byte_what_a_dropped_connection_left_unanswered() -> None:
    client, server = connected()
    frames = [ask(client, after=number) for number in range(6)]
    for frame in frames[:4]:  # 4 and 5 are lost on the way
        take(server, frame)
    answered(client, reply(server, 1))
    lost = reply(server, 2)  # and so is this answer

    again = resend(client)
    assert again == [frames[seq] for seq in (0, 2, 3, 4, 5)]
    assert server.receive(again[0]) == (None, None)  # still worked on
    assert joined(server.receive(again[1])[1] or []) == lost
    assert server.receive(again[2]) == (None, None)
    assert [take(server, frame).seq for frame in again[3:]] == [4, 5]
    heard = [
        answer.seq
        for frame in (lost, *(reply(server, seq) for seq in (0, 3, 4, 5)))
        for answer in answered(client, frame)
    ]
    assert heard == [2, 0, 3, 4, 5]
    assert client.unanswered() == []


def test_client_repeats_a_tensor_byte_for_byte() -> None:
    client, server = connected()
    gradient = TensorBytes("f32", (1, 1, 4), bytes(range(16)))
    frame = joined(client.request(MESSAGE_TYPES["backward"](0, 0, 3, 2, 1, gradient))[1])
    assert take(server, frame).gradient == gradient  # type: ignore[union-attr]
    assert resend(client) == [frame]
    assert server.receive(frame) == (None, None)


def test_client_asks_to_resume_once_it_knows_a_session() -> None:
    client = ClientSession(Hello(PROTOCOL_VERSIONS, "ward-a", fresh=True))
    assert decode(joined(client.hello())) == Hello(PROTOCOL_VERSIONS, "ward-a", fresh=True)
    assert client.receive(welcome(resumed=False, session="one")) == [Connected(client.welcome)]  # type: ignore[arg-type]
    assert decode(joined(client.hello())) == Hello(PROTOCOL_VERSIONS, "ward-a", resume="one", next_seq=0)
    client.receive(welcome(resumed=False, session="two"))
    assert decode(joined(client.hello())) == Hello(PROTOCOL_VERSIONS, "ward-a", resume="two", next_seq=0)


def test_client_voids_its_requests_when_the_session_is_not_resumed() -> None:
    client, server = connected()
    for seq in range(3):
        take(server, ask(client))
        answered(client, reply(server, seq))
    ask(client)
    client.receive(welcome(resumed=False, session="another"))
    assert client.unanswered() == []
    request = take(ServerSession(), ask(client))
    assert (request.seq, request.ack) == (0, 0)


# the credit window


def test_client_waits_when_its_credit_is_used_up() -> None:
    client, server = connected()
    for _ in range(CREDIT_WINDOW):
        take(server, ask(client))
    with pytest.raises(ProtocolError, match="Wait for answers"):
        ask(client)
    assert client.next_seq == CREDIT_WINDOW
    answered(client, reply(server, 10))
    take(server, ask(client))


def test_client_waits_rather_than_run_past_the_servers_window() -> None:
    client, server = connected()
    take(server, ask(client))  # answered late
    for seq in range(1, 2 * CREDIT_WINDOW):
        take(server, ask(client))
        answered(client, reply(server, seq))
    with pytest.raises(ProtocolError, match="Wait for answers"):
        ask(client)
    answered(client, reply(server, 0))
    assert take(server, ask(client)).ack == 2 * CREDIT_WINDOW


def test_server_refuses_a_request_beyond_the_window() -> None:
    server = ServerSession()
    take(server, joined(encode(NextRound(2 * CREDIT_WINDOW - 1, 0, 0))))
    with pytest.raises(ProtocolError) as caught:
        server.receive(joined(encode(NextRound(2 * CREDIT_WINDOW, 0, 0))))
    assert caught.value.field == "seq"


def test_server_keeps_no_more_than_its_window() -> None:
    server = ServerSession()
    for seq in range(2 * CREDIT_WINDOW):
        take(server, joined(encode(NextRound(seq, 0, 0))))
        reply(server, seq)
    with pytest.raises(ProtocolError, match="credit window"):
        server.receive(joined(encode(NextRound(2 * CREDIT_WINDOW, 0, 0))))
    assert server.unacknowledged == 2 * CREDIT_WINDOW


@pytest.mark.parametrize(("seq", "ack"), [(1, 2), (0, 2**53), (2, 1), (2, 2)])
def test_server_refuses_an_acknowledgement_of_what_it_has_not_answered(seq: int, ack: int) -> None:
    client, server = connected()
    frame = ask(client)
    take(server, frame)
    with pytest.raises(ProtocolError) as caught:
        server.receive(joined(encode(NextRound(seq, ack, 0))))
    assert caught.value.field == "ack"
    answer = reply(server, 0)
    assert joined(server.receive(frame)[1] or []) == answer  # nothing was dropped


# versions and directions


def test_server_chooses_the_newest_common_version() -> None:
    assert choose_version(Hello((*PROTOCOL_VERSIONS, 9999), "a")) == max(PROTOCOL_VERSIONS)


@pytest.mark.parametrize("versions", [(7, 9), ()])
def test_server_refuses_a_hello_without_a_common_version_and_names_both_lists(versions: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError) as caught:
        choose_version(Hello(versions, "a"))
    assert str(list(versions)) in caught.value.message
    assert str(list(PROTOCOL_VERSIONS)) in caught.value.message
    assert caught.value.field == "versions"
    assert caught.value.remedy


def test_client_refuses_a_version_that_it_did_not_offer() -> None:
    client = ClientSession(Hello(PROTOCOL_VERSIONS, "a"))
    with pytest.raises(ProtocolError) as caught:
        client.receive(welcome(resumed=False, version=99))
    assert caught.value.field == "version"
    assert client.welcome is None


def examples(classes: Iterable[type]) -> list[Message]:
    """One message of each class, whatever is in it."""
    blank = {"versions": (1,), "name": "a", "code": "internal", "reason": "failed", "train": True, "merged": True}
    blank |= dict.fromkeys(("session", "incarnation", "settings", "weights"), "")
    blank |= dict.fromkeys(("sha256", "manifest", "signer", "head", "ledger_head"), HASH) | {"signature": 2 * HASH}
    blank |= {"records": (), "held": ()} | {"lengths": (), "resumed": False, "limit": 1}
    tensor = TensorBytes("u8", (0,), b"")
    blank |= dict.fromkeys(("hidden", "gradient", "data"), tensor)
    return [
        cls(**{name: blank.get(name, 1) for name in cls.__dataclass_fields__ if name not in {"remedy", "field"}})
        for cls in classes
        if cls is not Hello
    ] + ([Hello(PROTOCOL_VERSIONS, "a")] if Hello in classes else [])


@pytest.mark.parametrize("message", examples((Hello, Welcome, Refused, *ANSWERS)), ids=lambda m: type(m).__name__)
def test_server_refuses_a_message_that_is_no_request(message: Message) -> None:
    with pytest.raises(ProtocolError) as caught:
        ServerSession().receive(joined(encode(message)))
    assert caught.value.field == "t"


@pytest.mark.parametrize("message", examples((Hello, *REQUESTS)), ids=lambda m: type(m).__name__)
def test_client_refuses_a_message_that_no_server_sends(message: Message) -> None:
    client, _ = connected()
    with pytest.raises(ProtocolError) as caught:
        client.receive(joined(encode(message)))
    assert caught.value.field == "t"


def test_both_sides_refuse_a_frame_over_their_limit() -> None:
    frame = joined(encode(NextRound(0, 0, 0)))
    for session in (
        ServerSession(max_bytes=len(frame) - 1),
        ClientSession(Hello(PROTOCOL_VERSIONS, "a"), max_bytes=len(frame) - 1),
    ):
        with pytest.raises(ProtocolError) as caught:
            session.receive(frame)
        assert caught.value.field == "frame"


# any schedule of faults


class Faults(RuleBasedStateMachine):
    """Requests, work and answers in any order, over connections that are cut at any message.

    A cut loses whatever is still under way in either direction. Old frames may come again, at any time and in any
    order. At the end everything is delivered: each request was applied once, each answer reported once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = connected()
        self.online = True
        self.up: list[bytes] = []  # under way to the server, in order
        self.down: list[bytes] = []  # under way to the client
        self.sent_up: dict[int, bytes] = {}
        self.sent_down: list[bytes] = []
        self.applied: Counter[int] = Counter()
        self.delivered: Counter[int] = Counter()
        self.open: list[int] = []

    @rule(count=st.integers(1, 8))
    def client_asks(self, count: int) -> None:
        for _ in range(count):
            seq = self.client.next_seq
            try:
                frame = ask(self.client, after=seq)
            except ProtocolError:
                return  # no credit
            self.sent_up[seq] = frame
            if self.online:
                self.up.append(frame)

    def server_gets(self, frame: bytes) -> None:
        request, repeated = self.server.receive(frame)
        if request is not None:
            assert isinstance(request, NextRound)
            assert request.after == request.seq
            self.applied[request.seq] += 1
            self.open.append(request.seq)
        if repeated is not None:
            self.server_sends(joined(repeated))

    def server_sends(self, frame: bytes) -> None:
        self.sent_down.append(frame)
        if self.online:
            self.down.append(frame)

    def client_gets(self, frame: bytes) -> None:
        for answer in answered(self.client, frame):
            assert answer == RoundOpen(answer.seq, answer.seq, "")
            self.delivered[answer.seq] += 1

    @precondition(lambda self: self.up)
    @rule()
    def server_receives(self) -> None:
        self.server_gets(self.up.pop(0))

    @precondition(lambda self: self.open)
    @rule(choice=st.randoms(use_true_random=False))
    def server_answers(self, choice: object) -> None:
        seq = self.open.pop(choice.randrange(len(self.open)))  # type: ignore[attr-defined]
        self.server_sends(reply(self.server, seq))

    @precondition(lambda self: self.down)
    @rule()
    def client_receives(self) -> None:
        self.client_gets(self.down.pop(0))

    @precondition(lambda self: self.online)
    @rule(up=st.integers(0, 8), down=st.integers(0, 8))
    def connection_is_cut(self, up: int, down: int) -> None:
        """The first few of the messages under way still arrive."""
        self.online = False
        for frame in self.up[:up]:
            self.server_gets(frame)
        for frame in self.down[:down]:
            self.client_gets(frame)
        self.up, self.down = [], []

    @precondition(lambda self: not self.online)
    @rule()
    def connection_is_resumed(self) -> None:
        self.online = True
        again = resend(self.client)
        assert again == [self.sent_up[seq] for seq in sorted(self.sent_up) if seq not in self.delivered]
        self.up = again

    @precondition(lambda self: self.sent_up)
    @rule(choice=st.randoms(use_true_random=False))
    def old_request_comes_again(self, choice: object) -> None:
        self.server_gets(choice.choice(list(self.sent_up.values())))  # type: ignore[attr-defined]

    @precondition(lambda self: self.sent_down)
    @rule(choice=st.randoms(use_true_random=False))
    def old_answer_comes_again(self, choice: object) -> None:
        self.client_gets(choice.choice(self.sent_down))  # type: ignore[attr-defined]

    @invariant()
    def nothing_happens_twice_and_memory_is_bounded(self) -> None:
        assert set(self.applied.values()) <= {1}
        assert set(self.delivered.values()) <= {1}
        assert len(self.client.unanswered()) <= CREDIT_WINDOW
        assert self.server.unacknowledged + len(self.open) <= 2 * CREDIT_WINDOW

    def teardown(self) -> None:
        if self.online:
            self.connection_is_cut(0, 0)
        self.connection_is_resumed()
        while self.up or self.open or self.down:
            while self.up:
                self.server_gets(self.up.pop(0))
            while self.open:
                self.server_sends(reply(self.server, self.open.pop()))
            while self.down:
                self.client_gets(self.down.pop(0))
        assert set(self.applied) == set(self.delivered) == set(self.sent_up)
        self.nothing_happens_twice_and_memory_is_bounded()
        assert self.client.unanswered() == []


class TestAnySchedule(Faults.TestCase):
    settings = settings(
        max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
