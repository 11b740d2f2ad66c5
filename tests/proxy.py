"""A TCP proxy that fails on purpose: it cuts connections, forgets to tell, or stops passing bytes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self
from urllib.parse import urlsplit

PIECE_BYTES = 4096


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
