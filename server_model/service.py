"""The websocket shell of the trunk service: feeds frames in, sends frames out, decides nothing.

TLS and plain sockets share its port (``server_model/door.py``); who may speak is for ``server_model/admission.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from server_model import status
from server_model.admission import Admission, Peer
from server_model.coordinator import Coordinator, Progress
from server_model.door import Door
from server_model.members import Member
from server_model.tasks import spawn
from splitfl.config import Federation
from splitfl.errors import ConfigError, ProtocolError, RefusedError, SplitFLError, StorageError
from splitfl.pipe import SILENCE_LIMIT_S, send_frame, watch
from splitfl.wire.frames import DamagedError, Parts, decode, encode, frame_bytes
from splitfl.wire.messages import AskAuthority, Enrol, Hello, Message, Refused, Request

log = logging.getLogger("splitfl.server.service")

HELLO_S = 30.0  # seconds that an unknown client may take to say who it is
HELLO_BYTES = 64 << 10  # most that an unknown client may send
REVOCATION_CHECK_S = 1.0  # until an open connection of a revoked client is closed
FRAME_SLACK = 17 << 20  # beside the activations: a piece of an upload, and headers


class CountingConnection(ServerConnection):
    """A connection that begins behind the door, and counts what comes off its socket: a sign of life."""

    bytes_received = 0

    def __init__(self, door: Door, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._door = door
        self._begun = False
        self._early = b""  # what came after the TLS handshake and before ``begin``

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._door.knock(self, transport)  # type: ignore[arg-type]

    def begin(self, transport: asyncio.Transport) -> None:
        """The websocket starts, over TLS or the bare socket."""
        self._begun = True
        super().connection_made(transport)
        if self._early:
            self.data_received(self._early)

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._early += data
            return
        self.bytes_received += len(data)
        super().data_received(data)

    def eof_received(self) -> None:
        if self._begun:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.known(self)
        if self._begun:
            super().connection_lost(exc)


@dataclass
class Line:
    """One client's current connection, and the frames that wait to be sent on it.

    Back-pressure: while more than ``limit`` bytes wait, ``room`` waits too, and nothing more is read from a client
    that asks and does not listen.
    """

    connection: ServerConnection
    limit: int
    waiting_bytes: int = 0
    turned_out: Refused | None = None  # why its session was ended; a frame that is on its way hears the same
    _outgoing: asyncio.Queue[Parts] = field(default_factory=asyncio.Queue)
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def put(self, parts: Parts) -> None:
        """Send a frame when it is its turn."""
        self.waiting_bytes += frame_bytes(parts)
        self._outgoing.put_nowait(parts)

    async def room(self) -> None:
        """Wait until no more than ``limit`` bytes wait to be sent, or nothing is sent any more."""
        while self.waiting_bytes > self.limit and not self._ended:
            self._moved.clear()
            await self._moved.wait()

    async def write(self) -> None:
        """Send frames one after another (fragments of two must not mix) until the connection ends."""
        try:
            while True:
                parts = await self._outgoing.get()
                await send_frame(as_any(self.connection), parts)
                self.waiting_bytes -= frame_bytes(parts)
                self._moved.set()
        except ConnectionClosed:
            pass  # its reader says so
        finally:
            self._ended = True
            self._moved.set()


class Service:
    """Listens on ``host:port`` (port 0: any free one) and serves one coordinator.

    Without ``admission`` there is no TLS, and everybody may come: for a federation inside one process. A connection on
    which nothing moves for ``silence_limit_s`` seconds is dead.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        admission: Admission | None = None,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self.coordinator = coordinator
        self.admission = admission
        self.silence_limit_s = silence_limit_s
        self.door = Door(admission.authority.server_context() if admission else None)
        self.lines: dict[str, Line] = {}  # by session token
        self.frame_limit = frame_limit(coordinator.settings, coordinator.source.config.hidden_size)
        self._server: Server | None = None
        self._revocations: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Begin to listen; returns the port. Raises ConfigError when it cannot be had."""
        try:
            self._server = await serve(
                self._serve,
                host,
                port,
                compression=None,
                ping_interval=None,
                max_size=HELLO_BYTES,
                create_connection=partial(CountingConnection, self.door),  # type: ignore[arg-type]
                process_request=self._answer_http,
                origins=[None],  # no web page in some browser on this machine may speak to it
                server_header=None,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                "Choose another --listen HOST:PORT, or port 0 for any free one.",
            ) from error
        if self.admission is not None:
            self._revocations = asyncio.create_task(self._watch_revocations(self.admission))
        port_: int = next(iter(self._server.sockets)).getsockname()[1]
        return port_

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._revocations is not None:
            self._revocations.cancel()
        self.door.close()
        if self._server is not None:
            self._server.close(close_connections=True)
            await self._server.wait_closed()

    def _answer_http(self, connection: ServerConnection, asked: HttpRequest) -> Response | None:
        """The answer to a request that is for no websocket; None for all others."""
        hosts = asked.headers.get_all("Host")
        peer, *_ = connection.remote_address or ("",)  # none of one that has gone already
        told = status.answer(self.coordinator, asked.path, hosts[0] if len(hosts) == 1 else "", peer)
        if told is None:
            return None
        response = connection.respond(*told)
        if response.status_code == HTTPStatus.OK:
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
        return response

    async def _serve(self, connection: ServerConnection) -> None:
        """One connection from Hello to its end."""
        opened = await self._open(connection)
        if opened is None:
            return
        member, line = opened
        connection.protocol.max_message_size = self.frame_limit
        liveness = watch(as_any(connection), self.silence_limit_s)
        helpers = [asyncio.create_task(line.write()), asyncio.create_task(liveness)]
        try:
            async for data in connection:
                self._receive(member, line, data)
                await line.room()
        except ProtocolError as error:
            await refuse(connection, line.turned_out or refusal(refusal_code(error), error))
        except ConnectionClosed as closed:
            log.info("%s: connection ended: %s", member.name, closed)
        finally:
            for helper in helpers:
                helper.cancel()
            if self.lines.get(member.token) is line:
                del self.lines[member.token]
                self.coordinator.disconnected(member)

    async def _open(self, connection: ServerConnection) -> tuple[Member, Line] | None:
        """Read the first message and answer it; None when the client is refused, enrolled or gone."""
        peer = Peer.of(connection.transport)
        try:
            async with asyncio.timeout(HELLO_S):
                data = await connection.recv(decode=False)
            hello = await self._first_words(connection, peer, decode(data, max_bytes=HELLO_BYTES))
            if hello is None:
                return None
            member, welcome = self.coordinator.hello(hello, peer.serial, loopback=peer.loopback)
        except (ConnectionClosed, TimeoutError):
            return None
        except StorageError as error:  # its path is not for strangers
            log.error("%s", error)
            await refuse(connection, Refused("storage", "the server cannot use its books", "Tell its operator."))
            return None
        except (ProtocolError, RefusedError) as error:
            await refuse(connection, refusal(refusal_code(error), error))
            return None
        self.door.known(connection)  # type: ignore[arg-type]
        if not peer.encrypted and self.admission is not None:
            self.coordinator.report(Progress("unencrypted", {"client": member.name}))
        line = Line(connection, self.frame_limit)
        older = self.lines.get(member.token)
        self.lines[member.token] = line
        if older is not None:
            spawn(older.connection.close(1001, "resumed elsewhere"))
        line.put(encode(welcome))
        return member, line

    async def _first_words(self, connection: ServerConnection, peer: Peer, message: Message) -> Hello | None:
        """Hello of a client that may come in; None when it wanted something else and has it."""
        if self.admission is not None and isinstance(message, AskAuthority | Enrol):
            answer = await self.admission.answer(peer, message)
            await send_frame(as_any(connection), encode(answer))
            return None
        if not isinstance(message, Hello):
            raise ProtocolError("the first message must be hello", field="t")
        if self.admission is not None:
            await self.admission.admit(peer, message)
            await self._shut_out(self.admission)  # one that this client replaces has its name no longer
        return message

    async def _watch_revocations(self, admission: Admission) -> None:
        """Shut out clients whose certificates end while they are there."""
        while True:
            await asyncio.sleep(REVOCATION_CHECK_S)
            try:
                await self._shut_out(admission)
            except StorageError as error:
                log.error("%s", error)

    async def _shut_out(self, admission: Admission) -> None:
        """End the sessions of certificates that are no longer good, and their connections."""
        ended = await admission.ended()
        for member in self.coordinator.members:
            if member.certificate in ended:
                if (line := self.lines.get(member.token)) is not None:  # first, for frames that come meanwhile
                    line.turned_out = refusal("revoked", ended[member.certificate])
                    spawn(refuse(line.connection, line.turned_out))
                await self.coordinator.shut_out(member)

    def _receive(self, member: Member, line: Line, data: Any) -> None:
        if isinstance(data, str):
            raise ProtocolError("text instead of binary", field="frame")
        if member not in self.coordinator.members:
            raise ProtocolError("this session has ended", "Join again.")
        member.bytes_in += len(data)
        request, repeated = member.wire.receive(data)
        if repeated is not None:
            line.put(repeated)
        elif request is not None:
            spawn(self._answer(member, request))

    async def _answer(self, member: Member, request: Request) -> None:
        """Work on a request and send the answer on whatever connection the client has by then."""
        with contextlib.suppress(asyncio.CancelledError):
            answer = await self.coordinator.handle(member, request)
            parts = member.wire.answer(answer)
            line = self.lines.get(member.token)
            if line is not None:
                line.put(parts)
            member.bytes_out += frame_bytes(parts)


async def refuse(connection: ServerConnection, refusal: Refused) -> None:
    """Say why, then close."""
    with contextlib.suppress(ConnectionClosed):
        await send_frame(as_any(connection), encode(refusal))
        await connection.close(1008, refusal.code)


def refusal(code: str, error: SplitFLError) -> Refused:
    """An error as the peer may hear it, within the message's bounds."""
    return Refused(code, error.message[:2000], error.remedy[:2000])  # type: ignore[arg-type]


def refusal_code(error: ProtocolError | RefusedError) -> str:
    """The wire's name for what ends a connection."""
    if isinstance(error, RefusedError):
        return error.code
    if isinstance(error, DamagedError):
        return "damaged"
    return "version" if error.field == "versions" else "bad_message"


def as_any(connection: ServerConnection) -> Any:
    return connection


def frame_limit(settings: Federation, width: int) -> int:
    """Most bytes a client's frame may have: a step in one piece as fp32 activations, or a piece of an upload."""
    batch = settings.batch
    return 4 * batch.records * batch.max_length * width + FRAME_SLACK
