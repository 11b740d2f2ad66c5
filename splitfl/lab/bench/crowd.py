"""Many clients that wait while a few train: what each of them costs the trunk service, and how soon it says how it is.

The clients are real websockets and sessions without a model behind them: those that train send random numbers of the
right shapes as fast as the trunk answers. Meanwhile somebody asks for the status now and then.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

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
    Forward,
    Hello,
    NextRound,
    Request,
    RoundOpen,
    TensorBytes,
)
from splitfl.wire.session import Answered, ClientSession

PAUSE_S = 0.05  # between two looks at the status

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


async def watch_status(address: str) -> list[float]:
    """Seconds that each answer to GET /status took, connecting and all, until this is cancelled."""
    taken: list[float] = []
    try:
        while True:
            began = time.perf_counter()
            status = await asyncio.to_thread(get_status, address)
            taken.append(time.perf_counter() - began)
            if status["phase"] != "training":
                raise ProtocolError(f"the status says {status['phase']}")
            await asyncio.sleep(PAUSE_S)
    except asyncio.CancelledError:
        return taken


def get_status(address: str) -> dict[str, Any]:
    """What the service at ``address`` (HOST:PORT) says of itself."""
    with urlopen(f"http://{address}/status") as response:
        told: dict[str, Any] = json.load(response)
    return told


def measure(model: Path, width: int, crowd: Crowd) -> dict[str, Any]:
    """The trunk service's memory for each client that waits, and its answers while others train."""
    settings = SETTINGS.format(active=crowd.active, records=crowd.records, length=crowd.length)
    with served(model, settings) as (url, _):
        (trunk,) = (child for child in psutil.Process().children() if "serve" in child.cmdline())
        return asyncio.run(gather(url, trunk, width, crowd))


async def gather(url: str, trunk: psutil.Process, width: int, crowd: Crowd) -> dict[str, Any]:
    """The measurement itself: those that train come first, then those that wait, then the looks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(crowd.records, crowd.length, width, generator=generator)
    payload = encode_tensor(hidden, "bf16")
    callers = [Caller(f"client-{number}") for number in range(crowd.connected)]
    active, idle = callers[: crowd.active], callers[crowd.active :]
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
    after = trunk.memory_info().rss
    asking = asyncio.create_task(watch_status(urlsplit(url).netloc))
    began = time.perf_counter()
    await asyncio.gather(*(caller.train(payload, range(1, 1 + crowd.steps)) for caller in active))
    seconds = time.perf_counter() - began
    asking.cancel()
    answers = await asking
    for caller in callers:
        caller.vanish()
    return {
        "connected": crowd.connected,
        "active": crowd.active,
        "idle_client_bytes": (after - before) / len(idle),
        "status_s": spread(answers),
        "status_99th_s": quantiles(answers, n=100)[-1] if len(answers) > 1 else answers[0],
        "answers": len(answers),
        "step_s": seconds / crowd.steps,
    }
