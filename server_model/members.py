"""Who takes part: one session a client, and it outlives its connections by the grace period."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server_model.steps import StepKey
from splitfl.codec.tensors import CodecName
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import RefusedError
from splitfl.split.shares import Shapes
from splitfl.wire.messages import Hello, TensorBytes
from splitfl.wire.session import ServerSession

MAX_SESSIONS = 1024  # more clients than one trunk serves; a stranger on a plain socket must not fill the memory


@dataclass
class Member:
    """One client's session."""

    name: str
    token: str
    cut: Cut
    shared: Shapes  # the weights that it sends for merging
    micro_batches: int = 1  # pieces of a step
    codec: CodecName = "bf16"  # of what it is sent
    wire: ServerSession = field(default_factory=ServerSession)
    connected: bool = True
    certificate: str = ""  # serial number of the one that it came with last; "" on a plain socket
    loopback: bool = False  # it came last over loopback
    expiry: asyncio.TimerHandle | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    passing: dict[str, TensorBytes] = field(default_factory=dict)  # released, no room to keep: for the next Forward
    stalled: StepKey | None = None  # its Forward named records that are missing; those behind it wait too


class Members:
    """Sessions by token. ``left`` is told of each client that is gone for good, and why."""

    def __init__(
        self, settings: Federation, layers: int, shapes_of: Callable[[Cut], Shapes], left: Callable[[Member, str], None]
    ) -> None:
        self.settings = settings
        self.layers = layers
        self._shapes_of = shapes_of
        self._left = left
        self._by_token: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._by_token.values()))

    def __len__(self) -> int:
        return len(self._by_token)

    def __contains__(self, member: object) -> bool:
        """Whether this session still is."""
        return isinstance(member, Member) and self._by_token.get(member.token) is member

    def named(self, name: str) -> Member:
        """The session of a client that takes part."""
        return next(member for member in self if member.name == name)

    def welcome(self, hello: Hello) -> tuple[Member, bool]:
        """Open a session, or resume the one that Hello names; whether it was resumed. Raises RefusedError."""
        known = self._by_token.get(hello.resume)
        if known is not None and known.name == hello.name and not hello.fresh and remembers_all(hello, known):
            known.connected = True
            cancel(known)
            return known, True
        # a mistaken plan must not cost the session that there is
        cut, pieces, codec = self._cut_of(hello), self._pieces_of(hello), self._codec_of(hello)
        if known is not None and known.name == hello.name:
            self.forget(known, "it came back without that session's state")
        return self._new(hello, cut, pieces, codec), False

    def _new(self, hello: Hello, cut: Cut, pieces: int, codec: CodecName) -> Member:
        for other in self:
            if other.name != hello.name:
                continue
            if other.connected:
                raise RefusedError(
                    f"a client named {hello.name!r} is connected already",
                    "Choose another --name, or stop the other client.",
                    code="name_taken",
                )
            self.forget(other, "it came back with a new session")
        if len(self) >= MAX_SESSIONS:
            raise RefusedError(
                f"{MAX_SESSIONS} clients are here already", "Try again later, or tell the operator.", code="over_limit"
            )
        member = Member(hello.name, secrets.token_urlsafe(24), cut, self._shapes_of(cut), pieces, codec)
        self._by_token[member.token] = member
        return member

    def _pieces_of(self, hello: Hello) -> int:
        """The micro-batches that Hello asks for, or the federation's. Raises RefusedError."""
        records = self.settings.batch.records
        pieces = hello.micro_batches or self.settings.batch.micro_batches
        if records % pieces:
            raise RefusedError(
                f"{pieces} micro-batches do not divide the {records} records of a step",
                "Plan again with `splitfl probe`.",
                code="bad_plan",
            )
        return pieces

    def _codec_of(self, hello: Hello) -> CodecName:
        """The number format that Hello asks for, or the federation's. Raises RefusedError."""
        wire = self.settings.wire
        if hello.codec and hello.codec not in wire.codecs:
            raise RefusedError(
                f"the number format {hello.codec} is not allowed here ({', '.join(wire.codecs)})",
                "Plan again with `splitfl probe`.",
                code="bad_plan",
            )
        return hello.codec or wire.codec

    def _cut_of(self, hello: Hello) -> Cut:
        """The cut that Hello asks for, or the federation's. Raises RefusedError."""
        if hello.n_bottom < 0 or hello.n_top < 0:
            return self.settings.cut
        cut = Cut(hello.n_bottom, hello.n_top)
        if not self.settings.allows(cut) or cut.n_bottom + cut.n_top > self.layers:
            low, high = self.settings.bottoms, self.settings.tops
            raise RefusedError(
                f"cut {cut} is not allowed here (bottom {low[0]} to {low[-1]}, top {high[0]} to {high[-1]}, "
                f"{self.layers} blocks in all)",
                "Choose another --plan, or leave it out.",
                code="bad_cut",
            )
        return cut

    def disconnected(self, member: Member) -> bool:
        """The connection is gone: the session stays for the grace period. False when it is gone already."""
        if member not in self:
            return False
        member.connected = False
        loop = asyncio.get_running_loop()
        grace = self.settings.trunk.grace_s
        member.expiry = loop.call_later(grace, self.forget, member, f"it was away for more than {grace:g} s")
        return True

    def forget(self, member: Member, why: str) -> None:
        """Drop a session: its client takes part no more until it says Hello anew."""
        if self._by_token.pop(member.token, None) is not None:
            cancel(member)
            self._left(member, why)

    def close(self) -> None:
        """Stop all timers."""
        for member in self:
            cancel(member)


def remembers_all(hello: Hello, member: Member) -> bool:
    """Whether the client knows of every request that it has sent: a power cut may have cost it the last ones."""
    return hello.next_seq is None or hello.next_seq >= member.wire.next_seq


def cancel(member: Member) -> None:
    """Stop the timer that would end the session."""
    if member.expiry is not None:
        member.expiry.cancel()
        member.expiry = None
