"""Proxies that fail on purpose: one of bytes, which cuts connections, forgets to tell, or stops passing anything on;
and one of messages, which does something to one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from splitfl.wire.frames import decode

PIECE_BYTES = 4096
DELAY_S = 0.5


class Proxy:
    """Listens on a free loopback port and passes everything on to the server at ``url``.

    ``budgets`` gives for each new connection how many bytes (both ways together) may pass before it is cut; None
    is no limit. With ``deaf`` the server is not told when a client hangs up: it goes on believing in it.
    """

    def __init__(self, url: str, *, budgets: Iterator[int | None] | None = None, deaf: bool = False) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._budgets = budgets
        self._deaf = deaf
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._flowing = asyncio.Event()
        self._loop.call_soon_threadsafe(self._flowing.set)
        self.pause_s = 0.0  # between pieces, to make the link slow
        self.cuts = 0
        self.connections = 0
        self._server: asyncio.Server = self._call(self._start())
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def stall(self) -> None:
        """Pass nothing on any more, and close nothing: a link that died silently."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def _call(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=10)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        budget = next(self._budgets, None) if self._budgets is not None else None
        try:
            upstream_reader, upstream = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        left = [budget]
        up = asyncio.create_task(self._pass(reader, upstream, left))
        down = asyncio.create_task(self._pass(upstream_reader, writer, left))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            if self._deaf and up.done() and left[0] is None:
                await asyncio.Event().wait()  # the client is gone; the server shall not know
        for task in (up, down):
            task.cancel()
        for side in (writer, upstream):
            side.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int | None]) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(PIECE_BYTES):
                await self._flowing.wait()
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                if left[0] is not None:
                    left[0] -= len(data)
                    if left[0] <= 0:
                        self.cuts += 1
                        return
                writer.write(data)
                await writer.drain()


def every(size: Callable[[], int], cuts: int) -> Iterator[int | None]:
    """Budgets: ``cuts`` connections that are cut, then sound ones."""
    for _ in range(cuts):
        yield size()


class Meddler:
    """Passes websocket messages on to the server at ``url``; does ``fault`` to the ``nth`` message of type ``kind``.

    ``drop``: it is lost, and the connection with it, as on TCP. ``delay``: it comes late, and so does all behind it.
    ``corrupt``: a bit of it is flipped. ``duplicate``: it comes twice. ``hits`` counts what was done.
    """

    def __init__(self, url: str, kind: type, fault: str, nth: int = 1) -> None:
        self._target, self._kind, self._fault, self._left = url, kind, fault, nth
        self.hits = self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(self._start())
        self.url = f"ws://127.0.0.1:{next(iter(self._server.sockets)).getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _start(self) -> Any:
        return await serve(self._serve, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None)

    async def _stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, client: Any) -> None:
        self.connections += 1
        async with connect(
            self._target, compression=None, max_size=None, ping_interval=None, proxy=None, close_timeout=0.2
        ) as server:
            pumps = [asyncio.create_task(self._pump(*ways)) for ways in ((client, server), (server, client))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()

    async def _pump(self, source: Any, target: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in source:
                await self._pass_on(data, target)

    async def _pass_on(self, data: bytes, target: Any) -> None:
        self._left -= isinstance(decode(data), self._kind)
        if self._left or self.hits:
            await target.send(data)
            return
        self.hits += 1
        match self._fault:
            case "drop":
                target.transport.abort()
            case "delay":
                await asyncio.sleep(DELAY_S)
                await target.send(data)
            case "corrupt":
                place = len(data) // 2
                await target.send(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            case "duplicate":
                await target.send(data)
                await target.send(data)
