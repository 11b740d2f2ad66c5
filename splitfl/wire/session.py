"""Both sides of a session as state machines: bytes in, events out; messages in, bytes out. No sockets, no clock.

A session outlives its connections. The client numbers its requests and keeps each until it is answered; after a
reconnection it sends the unanswered ones again, byte for byte. The server keeps each answer until the client
acknowledges it, so a repeated request is answered from memory and **no gradient is applied twice**. A request
that is still being worked on is answered once, on whatever connection is there by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from splitfl.errors import ProtocolError
from splitfl.wire.frames import MAX_FRAME_BYTES, Parts, decode, encode
from splitfl.wire.messages import (
    ANSWERS,
    PROTOCOL_VERSIONS,
    REQUESTS,
    Answer,
    Chunk,
    Hello,
    Refused,
    Request,
    Welcome,
)

CREDIT_WINDOW = 64  # most requests that may be unanswered at once


@dataclass(frozen=True)
class Connected:
    """The server said Welcome. When the old session was not resumed, every unanswered request is void."""

    welcome: Welcome


@dataclass(frozen=True)
class Rejected:
    """The server refuses this client, or gave up on the connection."""

    refusal: Refused


@dataclass(frozen=True)
class Answered:
    """``answer`` to the request with its number; each number is reported once."""

    answer: Answer


ClientEvent = Connected | Rejected | Answered


class Keeper(Protocol):
    """Keeps what a client must know to go on with its session in another process. What it raises stops the client."""

    def sent(self, seq: int, parts: Parts) -> None:
        """A request is about to be sent for the first time."""
        ...

    def answered(self, answer: Answer, frame: bytes | memoryview) -> None:
        """An answer is about to be handed on; no request acknowledges it before this returns."""
        ...

    def lost(self) -> None:
        """The server knows the session no more."""
        ...


class ClientSession:
    """The client's side: feed it what arrives; send what ``hello``, ``request`` and ``unanswered`` give."""

    def __init__(
        self,
        hello: Hello,
        *,
        next_seq: int = 0,
        unanswered: Mapping[int, bytes] | None = None,
        keeper: Keeper | None = None,
        max_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """``next_seq`` and ``unanswered`` frames go on with a session (``hello.resume``) of an earlier process."""
        self._hello = hello
        self._max_bytes = max_bytes
        self._keeper = keeper
        self._unanswered: dict[int, Parts] = {seq: [frame] for seq, frame in (unanswered or {}).items()}
        self._next_seq = next_seq
        self._ack = min(self._unanswered, default=next_seq)  # all requests below this number are answered
        self._answered = set(range(self._ack, next_seq)) - self._unanswered.keys()  # beyond the contiguous ones
        self.welcome: Welcome | None = None

    def hello(self) -> Parts:
        """The first frame of each connection; it asks to resume once a session is known."""
        resume = self._hello.resume if self.welcome is None else self.welcome.session
        fresh = self._hello.fresh and self.welcome is None
        next_seq = self._next_seq if resume and not fresh else None
        return encode(replace(self._hello, resume=resume, fresh=fresh, next_seq=next_seq))

    def request(self, message: Request) -> tuple[int, Parts]:
        """Number ``message`` (its ``seq`` and ``ack`` are filled in here) and remember it until it is answered."""
        if self.credit <= 0:
            raise ProtocolError(f"{len(self._unanswered)} requests are unanswered", "Wait for answers first.")
        seq = self._next_seq
        parts = encode(replace(message, seq=seq, ack=self._ack))
        if self._keeper is not None:
            self._keeper.sent(seq, parts)
        self._next_seq += 1
        self._unanswered[seq] = parts
        return seq, parts

    @property
    def next_seq(self) -> int:
        """The number of the next request."""
        return self._next_seq

    @property
    def credit(self) -> int:
        """How many more requests may be sent before an answer comes; one left waiting long holds up the rest."""
        return min(CREDIT_WINDOW - len(self._unanswered), self._ack + 2 * CREDIT_WINDOW - self._next_seq)

    def unanswered(self) -> list[Parts]:
        """Frames to send again on a resumed session, in order."""
        return [self._unanswered[seq] for seq in sorted(self._unanswered)]

    def receive(self, data: bytes | memoryview) -> list[ClientEvent]:
        """One frame -> what it means. Raises ProtocolError for bytes that no honest server sends."""
        message = decode(data, max_bytes=self._max_bytes)
        if isinstance(message, Welcome):
            return [self._connected(message)]
        if isinstance(message, Refused):
            return [Rejected(message)]
        if not isinstance(message, ANSWERS):
            raise ProtocolError(f"a server never sends {type(message).__name__}", field="t")
        return self._answer(message, data)  # type: ignore[arg-type]

    def _connected(self, welcome: Welcome) -> Connected:
        if welcome.version not in self._hello.versions:
            raise ProtocolError(f"the server chose protocol version {welcome.version}", field="version")
        if not welcome.resumed:
            if self._keeper is not None:
                self._keeper.lost()
            self._unanswered.clear()
            self._answered.clear()
            self._next_seq = self._ack = 0
        self.welcome = welcome
        return Connected(welcome)

    def _answer(self, answer: Answer, frame: bytes | memoryview) -> list[ClientEvent]:
        if answer.seq not in self._unanswered:
            return []  # sent twice around a reconnection; the first one counted
        if self._keeper is not None:
            self._keeper.answered(answer, frame)
        del self._unanswered[answer.seq]
        self._answered.add(answer.seq)
        while self._ack in self._answered:
            self._answered.discard(self._ack)
            self._ack += 1
        return [Answered(answer)]


def choose_version(hello: Hello) -> int:
    """The newest protocol version both sides speak. Raises ProtocolError that names both lists."""
    common = set(hello.versions) & set(PROTOCOL_VERSIONS)
    if not common:
        raise ProtocolError(
            f"the client speaks protocol {list(hello.versions)}, the server {list(PROTOCOL_VERSIONS)}",
            "Install the same SplitFL release on both sides.",
            field="versions",
        )
    return max(common)


class ServerSession:
    """The server's side of one client. ``receive`` gives new requests; ``answer`` gives the frame to send."""

    def __init__(self, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._answers: dict[int, Parts | None] = {}
        self._open: set[int] = set()
        self._ack = 0
        self.next_seq = 0  # above every request that has come

    def receive(self, data: bytes | memoryview) -> tuple[Request | None, Parts | None]:
        """One frame -> (a new request, None), or (None, a frame to repeat), or (None, None) while it is worked on.

        Raises ProtocolError for bytes that no honest client sends, and for more than the credit window.
        """
        message = decode(data, max_bytes=self._max_bytes)
        if not isinstance(message, REQUESTS):
            raise ProtocolError(f"a client never sends {type(message).__name__} here", field="t")
        request: Request = message  # type: ignore[assignment]
        seq = request.seq
        if request.ack > min(self._open | {seq}):
            raise ProtocolError(f"request {seq} acknowledges {request.ack}, which has no answer yet", field="ack")
        self._acknowledge(request.ack)
        if seq in self._answers:
            kept = self._answers[seq]
            if kept is not None:
                return None, kept
            del self._answers[seq]  # a piece of a blob: it is read again rather than kept
            self._open.add(seq)
            return request, None
        if seq in self._open or seq < self._ack:
            return None, None
        if len(self._open) + len(self._answers) >= 2 * CREDIT_WINDOW or seq >= self._ack + 2 * CREDIT_WINDOW:
            raise ProtocolError(f"request {seq} is beyond the credit window", field="seq")
        self._open.add(seq)
        self.next_seq = max(self.next_seq, seq + 1)
        return request, None

    def answer(self, answer: Answer) -> Parts:
        """Encode the answer to an open request and keep it until the client acknowledges it."""
        self._open.discard(answer.seq)
        parts = encode(answer)
        self._answers[answer.seq] = None if isinstance(answer, Chunk) else parts
        return parts

    def _acknowledge(self, ack: int) -> None:
        if ack <= self._ack:
            return  # nothing new, or an older frame, sent again
        for seq in [seq for seq in self._answers if seq < ack]:
            del self._answers[seq]
        self._ack = ack

    @property
    def unacknowledged(self) -> int:
        """How many answers are kept."""
        return len(self._answers)
