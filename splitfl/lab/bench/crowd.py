"""Many clients that wait while a few train: what each of them costs the trunk service, and how soon it answers.

The clients are real websockets and sessions without a model behind them: those that train send random numbers of the
right shapes as fast as the trunk answers. One that waits asks for an echo now and then, as a status line would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
import torch

from client_model.link import dial
from splitfl.codec.tensors import encode_tensor
from splitfl.errors import ProtocolError
from splitfl.lab.bench.harness import served, spread
from splitfl.pipe import send_frame
from splitfl.wire.messages import (
    PROTOCOL_VERSIONS,
    Answer,
    Backward,
    Echo,
    Forward,
    Hello,
    NextRound,
    Request,
    RoundOpen,
    TensorBytes,
)
from splitfl.wire.session import Answered, ClientSession

PAUSE_S = 0.05  # between two echoes

SETTINGS = """
[rounds]
min_clients = {active}
local_steps = 100000
[batch]
records = {records}
max_length = {length}
[model]
freeze_below = 0
"""


@dataclass(frozen=True)
class Crowd:
    """How many are there, how many of them train, and how many steps."""

    connected: int = 256
    active: int = 16
    steps: int = 4
    records: int = 2
    length: int = 64


class Caller:
    """One client's websocket and session: asks one thing after another."""

    connection: Any

    def __init__(self, name: str) -> None:
        self.session = ClientSession(Hello(PROTOCOL_VERSIONS, name))

    async def arrive(self, url: str) -> None:
        """Connect and be welcomed."""
        self.connection = await dial(url, None)
        await send_frame(self.connection, self.session.hello())
        self.session.receive(await self.connection.recv(decode=False))

    def vanish(self) -> None:
        """Hang up without a word: two hundred orderly ends would take longer than the benchmark."""
        self.connection.transport.abort()

    async def send(self, request: Request) -> None:
        await send_frame(self.connection, self.session.request(request)[1])

    async def ask(self, request: Request) -> Answer:
        """Raises ProtocolError when the server sends no answer."""
        await self.send(request)
        events = self.session.receive(await self.connection.recv(decode=False))
        if not events or not isinstance(events[0], Answered):
            raise ProtocolError(f"{events} instead of an answer")
        return events[0].answer

    async def train(self, payload: TensorBytes, steps: Iterable[int]) -> None:
        """Whole steps of one micro-batch; the gradient is the activation."""
        tokens = payload.shape[0] * payload.shape[1]
        for step in steps:
            await self.ask(Forward(0, 0, 0, step, 0, True, tokens, (), payload))
            await self.ask(Backward(0, 0, 0, step, 0, payload))

    async def echoes(self) -> list[float]:
        """Seconds that each echo took, until this is cancelled."""
        taken: list[float] = []
        try:
            while True:
                began = time.perf_counter()
                await self.ask(Echo(0, 0, TensorBytes("u8", (1,), b"\0"), 1))
                taken.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE_S)
        except asyncio.CancelledError:
            return taken


def measure(model: Path, width: int, crowd: Crowd) -> dict[str, Any]:
    """The trunk service's memory for each client that waits, and its answers while others train."""
    settings = SETTINGS.format(active=crowd.active, records=crowd.records, length=crowd.length)
    with served(model, settings) as (url, _):
        (trunk,) = (child for child in psutil.Process().children() if "serve" in child.cmdline())
        return asyncio.run(gather(url, trunk, width, crowd))


async def gather(url: str, trunk: psutil.Process, width: int, crowd: Crowd) -> dict[str, Any]:
    """The measurement itself: those that train come first, then those that wait, then the echoes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(crowd.records, crowd.length, width, generator=generator)
    payload = encode_tensor(hidden, "bf16")
    callers = [Caller(f"client-{number}") for number in range(crowd.connected)]
    active, idle = callers[: crowd.active], callers[crowd.active :]
    asks = Caller("asks")
    for caller in active:
        await caller.arrive(url)
    opened = await asyncio.gather(*(caller.ask(NextRound(0, 0, -1)) for caller in active))
    if not all(isinstance(answer, RoundOpen) for answer in opened):
        raise ProtocolError(f"{opened} instead of an open round")
    await asyncio.gather(*(caller.train(payload, [0]) for caller in active))  # what it needs once, it has from here on
    before = trunk.memory_info().rss
    for caller in idle:
        await caller.arrive(url)
        await caller.send(NextRound(0, 0, -1))  # answered when the round is over
    await asks.arrive(url)
    after = trunk.memory_info().rss
    asking = asyncio.create_task(asks.echoes())
    began = time.perf_counter()
    await asyncio.gather(*(caller.train(payload, range(1, 1 + crowd.steps)) for caller in active))
    seconds = time.perf_counter() - began
    asking.cancel()
    echoes = await asking
    for caller in (*callers, asks):
        caller.vanish()
    return {
        "connected": crowd.connected,
        "active": crowd.active,
        "idle_client_bytes": (after - before) / len(idle),
        "echo_s": spread(echoes),
        "echo_99th_s": quantiles(echoes, n=100)[-1] if len(echoes) > 1 else echoes[0],
        "echoes": len(echoes),
        "step_s": seconds / crowd.steps,
    }
