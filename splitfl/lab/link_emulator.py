"""A slow and distant link on this machine: a TCP proxy that passes every byte on when such a link would have.

Each way is a first-in-first-out line with a rate, a delay, jitter and stalls, behind a bounded queue. A piece that
comes is given the times at which it leaves and arrives (``Schedule``, which is arithmetic), and is handed on at the
latter; times are set from the schedule and not from when the proxy woke up, so lateness does not add up. TCP's own slow
start and losses are not emulated: connections here are long-lived.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import random
import socket
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Self
from urllib.parse import urlsplit

from splitfl.errors import ConfigError, SplitFLError

PIECE_BYTES = 16 << 10
SOCKET_BYTES = 64 << 10  # that the kernel holds for the proxy: what waits shall wait in the queue, or at the sender
START_S = 60.0  # for the proxy's process
SAME_SPELL_S = 1e-4  # pieces closer than this are one spell in the log


@dataclass(frozen=True)
class Conditions:
    """One way of a link. Raises ConfigError for one on which nothing would ever arrive.

    ``rate`` in bytes a second, ``delay_s`` one way; ``jitter_s`` delays each piece by up to as much again, in order.
    Every ``stall_every_s`` seconds nothing leaves for ``stall_s`` (0: never). ``queue_bytes`` may wait to leave; then
    the sender is read no more.
    """

    rate: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    stall_every_s: float = math.inf
    stall_s: float = 0.0
    queue_bytes: int = 256 << 10

    def __post_init__(self) -> None:
        times = (self.delay_s, self.jitter_s, self.stall_s)
        if not (self.rate > 0 and self.queue_bytes > 0 and min(times) >= 0 and self.stall_s < self.stall_every_s):
            raise ConfigError(f"no link is like this: {self}", "Give positive rates and shorter stalls.")

    @property
    def window(self) -> int:
        """Bytes that the line holds at most: those that wait, and those on their way."""
        return self.queue_bytes + math.ceil(self.rate * (self.delay_s + self.jitter_s))


@dataclass(frozen=True)
class Passage:
    """When a piece begins to leave, has left, and has arrived, in seconds of the caller's clock."""

    began: float
    left: float
    arrived: float


class Schedule:
    """When what comes to a line leaves it and arrives; pieces keep their order. Stalls count from ``start``."""

    def __init__(self, conditions: Conditions, *, start: float = 0.0, seed: int = 0) -> None:
        self.conditions = conditions
        self._start = self._free = self._last = start
        self._random = random.Random(seed)

    def take(self, now: float, nbytes: int) -> Passage:
        """A piece of ``nbytes`` comes at ``now``."""
        conditions = self.conditions
        began = self._out_of_stall(max(now, self._free))
        self._free = self._after(began, nbytes / conditions.rate)
        late = conditions.delay_s + conditions.jitter_s * self._random.random()
        self._last = max(self._last, self._free + late)
        return Passage(began, self._free, self._last)

    def _out_of_stall(self, time: float) -> float:
        """``time``, or the end of the stall in which it lies."""
        every, stall = self.conditions.stall_every_s, self.conditions.stall_s
        into = (time - self._start) % every
        return time if into <= every - stall else time + (every - into)

    def _after(self, began: float, busy: float) -> float:
        """When a line that is not stalled at ``began`` has worked for ``busy`` seconds."""
        every, stall = self.conditions.stall_every_s, self.conditions.stall_s
        until_stall = max(0.0, every - stall - (began - self._start) % every)
        if busy <= until_stall:
            return began + busy
        stalls = 1 + (busy - until_stall) // (every - stall)
        return began + busy + stalls * stall


@dataclass
class Spell:
    """A time in which the line was sending without a pause."""

    began: float
    left: float
    arrived: float
    nbytes: int


@dataclass
class Log:
    """What went one way: ``time.monotonic`` seconds, the same in every process of a machine."""

    spells: list[Spell] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(spell.nbytes for spell in self.spells)

    def add(self, passage: Passage, nbytes: int) -> None:
        """Count a piece; one that follows on the last one's heels lengthens its spell."""
        last = self.spells[-1] if self.spells else None
        if last is not None and passage.began - last.left < SAME_SPELL_S:
            last.left, last.arrived, last.nbytes = passage.left, passage.arrived, last.nbytes + nbytes
        else:
            self.spells.append(Spell(passage.began, passage.left, passage.arrived, nbytes))


class Line:
    """One way of one connection: what ``reader`` gives, ``writer`` gets when ``schedule`` says."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, schedule: Schedule, log: Log
    ) -> None:
        self._reader, self._writer, self._schedule, self._log = reader, writer, schedule, log
        self._held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._bytes = 0
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Until the sender has no more and all of it has arrived. Raises OSError when a socket breaks."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take())
            both.create_task(self._hand_on())

    async def _take(self) -> None:
        clock = asyncio.get_running_loop().time
        while data := await self._reader.read(PIECE_BYTES):
            passage = self._schedule.take(clock(), len(data))
            self._log.add(passage, len(data))
            self._bytes += len(data)
            self._held.put_nowait((passage.arrived, data))
            while self._bytes >= self._schedule.conditions.window:
                self._moved.clear()
                await self._moved.wait()
        self._held.put_nowait((0.0, b""))

    async def _hand_on(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            arrives, data = await self._held.get()
            if not data:
                self._writer.write_eof()
                return
            await asyncio.sleep(max(0.0, arrives - clock()))
            self._writer.write(data)
            await self._writer.drain()
            self._bytes -= len(data)
            self._moved.set()


class Proxy:
    """Passes connections on to ``host:port`` under ``up`` and ``down``, which all of them share."""

    def __init__(self, host: str, port: int, up: Conditions, down: Conditions, *, seed: int) -> None:
        self._target = (host, port)
        start = asyncio.get_running_loop().time()
        self._schedules = [Schedule(way, start=start, seed=2 * seed + n) for n, way in enumerate((up, down))]
        self.logs = (Log(), Log())

    async def serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """One connection from its beginning to its end."""
        with contextlib.suppress(OSError, ExceptionGroup, asyncio.CancelledError):  # a socket broke, or all is over
            server_reader, server = await asyncio.open_connection(sock=await self._dial(), limit=PIECE_BYTES)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(Line(client_reader, server, self._schedules[0], self.logs[0]).run())
                    both.create_task(Line(server_reader, client, self._schedules[1], self.logs[1]).run())
            finally:
                server.transport.abort()
        client.transport.abort()

    async def _dial(self) -> socket.socket:
        dialled = bounded(socket.socket())
        dialled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(dialled, self._target)
        return dialled


def bounded(sock: socket.socket) -> socket.socket:
    """The socket, of which the kernel buffers no more than SOCKET_BYTES; what is small leaves at once."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class LinkEmulator:
    """A proxy to the service at ``url``, in a process of its own, while the context is open.

    ``url`` is then its own address. Once the context has ended, ``up`` and ``down`` hold what went through it.
    """

    def __init__(self, url: str, up: Conditions, down: Conditions, *, seed: int = 0) -> None:
        parts = urlsplit(url)
        self._arguments = (parts.hostname, parts.port, up, down, seed)
        self._scheme = parts.scheme
        self.up, self.down = Log(), Log()

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._control, remote = context.Pipe()
        self._process = context.Process(target=run_proxy, args=(remote, *self._arguments), daemon=True)
        self._process.start()
        remote.close()
        if not self._control.poll(START_S):
            raise SplitFLError("the link emulator did not start", "Is the machine overloaded?")
        self.url = f"{self._scheme}://127.0.0.1:{self._control.recv()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._control.send(None)
        self.up, self.down = self._control.recv()
        self._control.close()
        self._process.join()


def run_proxy(control: Connection, host: str, port: int, up: Conditions, down: Conditions, seed: int) -> None:
    """The proxy's process: tells its port, runs until it is told to stop, tells what went through."""
    asyncio.run(proxy_until_told(control, host, port, up, down, seed))


async def proxy_until_told(
    control: Connection, host: str, port: int, up: Conditions, down: Conditions, seed: int
) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_reader(control.fileno(), stopped.set)
    proxy = Proxy(host, port, up, down, seed=seed)
    listening = bounded(socket.create_server(("127.0.0.1", 0)))
    server = await asyncio.start_server(proxy.serve, sock=listening, limit=PIECE_BYTES)
    control.send(listening.getsockname()[1])
    await stopped.wait()
    server.close()
    with contextlib.suppress(OSError):
        control.send(proxy.logs)
