"""What both websocket shells do alike, on any connection object: send a frame well, and tell slow from dead.

A frame below 1 MiB travels as one joined message, a larger one in fragments of 1 MiB that are views and not
copies. Liveness is progress: as long as bytes move in either direction, or pings are answered, a link is alive,
however slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

from splitfl.allocator import keep_freed_memory
from splitfl.wire.frames import Parts, frame_bytes

FRAGMENT_BYTES = 1 << 20
CHECK_INTERVAL_S = 5.0
SILENCE_LIMIT_S = 60.0


class Connection(Protocol):
    """What is needed of a websocket; ``bytes_received`` counts what came off the socket."""

    bytes_received: int
    transport: Any

    def send(self, message: Any) -> Awaitable[None]: ...

    def ping(self) -> Awaitable[Awaitable[float]]: ...


def tune_process(say: Callable[[str], None]) -> None:
    """Make this process fit for large frames, before anything large is allocated; ``say`` what it lacks."""
    keep_freed_memory()
    if find_spec("websockets.speedups") is None:
        say(
            "websockets is installed without its C extension, so large frames take several times as long: "
            "install it anew from a wheel, or with a C compiler at hand"
        )


async def send_frame(connection: Connection, parts: Parts) -> None:
    """Send one frame as one binary message."""
    if frame_bytes(parts) <= FRAGMENT_BYTES:
        await connection.send(b"".join(parts))
    else:
        await connection.send(fragments(parts))


def fragments(parts: Parts) -> Iterator[bytes | memoryview]:
    """Cut a frame's parts into fragments of at most 1 MiB without copying them."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), FRAGMENT_BYTES):
            yield view[start : start + FRAGMENT_BYTES]


async def watch(connection: Connection, silence_limit_s: float = SILENCE_LIMIT_S) -> None:
    """Break the connection when nothing has moved for ``silence_limit_s`` seconds. Runs until it is cancelled."""
    loop = asyncio.get_running_loop()
    last_seen, last_state = loop.time(), (-1, -1)
    ping = asyncio.ensure_future(ping_once(connection))
    while True:
        await asyncio.sleep(min(CHECK_INTERVAL_S, silence_limit_s / 3))
        state = (connection.bytes_received, write_buffer(connection))
        if state != last_state:
            last_seen, last_state = loop.time(), state
        elif loop.time() - last_seen > silence_limit_s:
            connection.transport.abort()  # a closing handshake would wait for who is dead
            return
        if ping.done():
            ping = asyncio.ensure_future(ping_once(connection))


async def ping_once(connection: Connection) -> None:
    """Send a ping and wait for its pong; a connection that closes meanwhile is not an error here."""
    with contextlib.suppress(Exception):
        await (await connection.ping())


def write_buffer(connection: Connection) -> int:
    """Bytes that wait to be sent."""
    return int(connection.transport.get_write_buffer_size())
