"""The door of the one port: TLS or plain is told by a connection's first byte, and strangers are few.

A TLS connection begins with 0x16 (a handshake record, RFC 8446 section 5.1), HTTP with a letter. The byte is looked at,
not taken, so either protocol starts as if it had the port to itself. A stranger is a connection that has not been
welcomed yet; when there are too many, the oldest is thrown out, so that those who come with good intent, which takes a
second, find room.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Any, Protocol

log = logging.getLogger("splitfl.server.door")

MAX_STRANGERS = 128
FIRST_BYTE_S = 10.0
TLS_HANDSHAKE_S = 10.0
TLS_RECORD = b"\x16"


class Visitor(Protocol):
    """A connection's protocol object; it is an ``asyncio.Protocol`` as well."""

    def begin(self, transport: Any) -> None:
        """The connection is there, over ``transport``."""


class Door:
    """Lets connections in. Without ``context`` there is no TLS."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.context = context
        self._strangers: dict[Any, tuple[asyncio.Task[None], asyncio.Transport]] = {}  # oldest first

    def knock(self, visitor: Visitor, transport: asyncio.Transport) -> None:
        """A socket was accepted; ``visitor.begin`` is called once it is clear what the peer speaks."""
        transport.pause_reading()
        task = asyncio.get_running_loop().create_task(self._let_in(visitor, transport))
        self._strangers[visitor] = task, transport
        while len(self._strangers) > MAX_STRANGERS:
            self._throw_out(next(iter(self._strangers)))

    def known(self, visitor: Visitor) -> None:
        """This one was welcomed, or has gone: it is no stranger any more."""
        self._strangers.pop(visitor, None)

    def close(self) -> None:
        """Throw out every stranger."""
        for visitor in list(self._strangers):
            self._throw_out(visitor)

    def _throw_out(self, visitor: Visitor) -> None:
        task, transport = self._strangers.pop(visitor)
        task.cancel()
        transport.abort()

    async def _let_in(self, visitor: Visitor, transport: asyncio.Transport) -> None:
        try:
            secured = await self._secured(visitor, transport)
        except (OSError, TimeoutError) as error:
            log.info("a connection was not let in: %s", error)
            secured = None
        if secured is None or secured.is_closing():
            self.known(visitor)
            transport.abort()
        else:
            visitor.begin(secured)

    async def _secured(self, visitor: Visitor, transport: asyncio.Transport) -> asyncio.Transport | None:
        """The transport to speak over: TLS if the peer begins it. Raises OSError (of which TLS errors are a kind)."""
        async with asyncio.timeout(FIRST_BYTE_S):
            first = await first_byte(transport)
        if first == TLS_RECORD:
            if self.context is None:
                return None
            return await asyncio.get_running_loop().start_tls(
                transport,
                visitor,  # type: ignore[arg-type]
                self.context,
                server_side=True,
                ssl_handshake_timeout=TLS_HANDSHAKE_S,
            )
        transport.resume_reading()
        return transport if first else None


async def first_byte(transport: asyncio.Transport) -> bytes:
    """Look at the first byte that a paused transport will read; b"" when the peer hangs up before it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    with transport.get_extra_info("socket").dup() as peeker:  # the loop watches no descriptor for two
        peeker.setblocking(False)
        loop.add_reader(peeker, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(peeker)
        return bytes(peeker.recv(1, socket.MSG_PEEK))
