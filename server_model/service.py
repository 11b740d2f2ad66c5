"""The websocket shell of the trunk service: feeds frames in, sends frames out, decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from server_model.coordinator import Coordinator
from server_model.members import Member
from server_model.tasks import spawn
from splitfl.config import Federation
from splitfl.errors import ConfigError, ProtocolError, RefusedError, SplitFLError
from splitfl.pipe import send_frame, watch
from splitfl.wire.frames import Parts, decode, encode, frame_bytes
from splitfl.wire.messages import Hello, Refused, Request

log = logging.getLogger("splitfl.server.service")

HELLO_S = 30.0  # seconds that an unknown client may take to say who it is
HELLO_BYTES = 64 << 10  # most that an unknown client may send
FRAME_SLACK = 17 << 20  # beside the activations: a piece of an upload, and headers


class CountingConnection(ServerConnection):
    """A connection that counts what comes off its socket: bytes that move are a sign of life."""

    bytes_received = 0

    def data_received(self, data: bytes) -> None:
        self.bytes_received += len(data)
        super().data_received(data)


@dataclass
class Line:
    """One client's current connection with its outgoing queue."""

    connection: ServerConnection
    outgoing: asyncio.Queue[Parts] = field(default_factory=asyncio.Queue)


class Service:
    """Listens on ``host:port`` (port 0: any free one) and serves one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.lines: dict[str, Line] = {}  # by session token
        self.frame_limit = frame_limit(coordinator.settings, coordinator.source.config.hidden_size)
        self._server: Server | None = None

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
                create_connection=CountingConnection,
                origins=[None],  # no web page in some browser on this machine may speak to it
                server_header=None,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                "Choose another --listen HOST:PORT, or port 0 for any free one.",
            ) from error
        port_: int = next(iter(self._server.sockets)).getsockname()[1]
        return port_

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._server is not None:
            self._server.close(close_connections=True)
            await self._server.wait_closed()

    async def _serve(self, connection: ServerConnection) -> None:
        """One connection from Hello to its end."""
        opened = await self._open(connection)
        if opened is None:
            return
        member, line = opened
        connection.protocol.max_message_size = self.frame_limit
        helpers = [asyncio.create_task(self._write(line)), asyncio.create_task(watch(as_any(connection)))]
        try:
            async for data in connection:
                self._receive(member, line, data)
        except ProtocolError as error:
            await refuse(connection, refusal("bad_message", error))
        except ConnectionClosed as closed:
            log.info("%s: connection ended: %s", member.name, closed)
        finally:
            for helper in helpers:
                helper.cancel()
            if self.lines.get(member.token) is line:
                del self.lines[member.token]
                self.coordinator.disconnected(member)

    async def _open(self, connection: ServerConnection) -> tuple[Member, Line] | None:
        """Read Hello and answer it; None when the client is refused or gone."""
        try:
            async with asyncio.timeout(HELLO_S):
                data = await connection.recv(decode=False)
            hello = decode(data, max_bytes=HELLO_BYTES)
            if not isinstance(hello, Hello):
                raise ProtocolError("the first message must be hello", field="t")
            member, welcome = self.coordinator.hello(hello)
        except (ConnectionClosed, TimeoutError):
            return None
        except ProtocolError as error:
            code = "version" if error.field == "versions" else "bad_message"
            await refuse(connection, refusal(code, error))
            return None
        except RefusedError as error:
            await refuse(connection, refusal(error.code, error))
            return None
        line = Line(connection)
        older = self.lines.get(member.token)
        self.lines[member.token] = line
        if older is not None:
            spawn(older.connection.close(1001, "resumed elsewhere"))
        line.outgoing.put_nowait(encode(welcome))
        return member, line

    def _receive(self, member: Member, line: Line, data: Any) -> None:
        if isinstance(data, str):
            raise ProtocolError("text instead of binary", field="frame")
        if member not in self.coordinator.members:
            raise ProtocolError("this session has ended", "Join again.")
        member.bytes_in += len(data)
        request, repeated = member.wire.receive(data)
        if repeated is not None:
            line.outgoing.put_nowait(repeated)
        elif request is not None:
            spawn(self._answer(member, request))

    async def _answer(self, member: Member, request: Request) -> None:
        """Work on a request and send the answer on whatever connection the client has by then."""
        with contextlib.suppress(asyncio.CancelledError):
            answer = await self.coordinator.handle(member, request)
            parts = member.wire.answer(answer)
            line = self.lines.get(member.token)
            if line is not None:
                line.outgoing.put_nowait(parts)
            member.bytes_out += frame_bytes(parts)

    async def _write(self, line: Line) -> None:
        """Send frames one after another: fragments of two must not mix."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await send_frame(as_any(line.connection), await line.outgoing.get())


async def refuse(connection: ServerConnection, refusal: Refused) -> None:
    """Say why, then close."""
    with contextlib.suppress(ConnectionClosed):
        await send_frame(as_any(connection), encode(refusal))
        await connection.close(1008, refusal.code)


def refusal(code: str, error: SplitFLError) -> Refused:
    """An error as the peer may hear it, within the message's bounds."""
    return Refused(code, error.message[:2000], error.remedy[:2000])  # type: ignore[arg-type]


def as_any(connection: ServerConnection) -> Any:
    return connection


def frame_limit(settings: Federation, width: int) -> int:
    """Most bytes a client's frame may have: one micro-batch of fp32 activations, or a piece of an upload."""
    batch = settings.batch
    return 4 * batch.records // batch.micro_batches * batch.max_length * width + FRAME_SLACK
