"""The link between them fails: cut in the middle of anything, slow, or dead without a word."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbing import SETTINGS
from processes import Place
from proxy import Proxy, every
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from client_model.link import CountingConnection
from splitfl.pipe import watch

Finish = Callable[..., None]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_connections_cut_in_the_middle_of_transfers_change_no_bit(
    place: Place, wards: dict[str, Path], finish: Finish, seed: int
) -> None:
    chance = random.Random(seed)
    server = place.serve(SETTINGS)
    budgets = every(lambda: chance.randint(60_000, 900_000), cuts=6)
    with Proxy(server.url, budgets=budgets) as proxy:
        first = place.join(proxy.url, "a", wards["a"])
        second = place.join(server.url, "b", wards["b"])
        finish(first, second, server.command)
        assert proxy.cuts >= 4
    assert f"waiting for the server at {proxy.url}" in first.stderr
    assert server.command.named("connected", client="a", resumed=True)


def talk(behave: Callable[[Proxy, CountingConnection], object], silence_limit_s: float) -> float:
    """Watch a connection through a proxy; how long it lived."""

    async def work() -> float:
        async def echo(connection: object) -> None:
            async for message in connection:  # type: ignore[attr-defined]
                await connection.send(message)  # type: ignore[attr-defined]

        async with serve(echo, "127.0.0.1", 0, ping_interval=None) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with Proxy(f"ws://127.0.0.1:{port}") as proxy:
                async with connect(
                    proxy.url, ping_interval=None, close_timeout=0.1, create_connection=CountingConnection, proxy=None
                ) as connection:
                    began = time.monotonic()
                    watcher = asyncio.create_task(watch(connection, silence_limit_s))  # type: ignore[arg-type]
                    behave(proxy, connection)  # type: ignore[arg-type]
                    await asyncio.wait([watcher], timeout=3.0)
                    lived = time.monotonic() - began
                    watcher.cancel()
                return lived

    return asyncio.run(work())


def test_link_that_died_without_a_word_is_closed() -> None:
    assert talk(lambda proxy, _: proxy.stall(), silence_limit_s=0.6) < 2.5


def test_link_that_is_idle_is_kept_by_its_pings() -> None:
    assert talk(lambda *_: None, silence_limit_s=0.3) >= 3.0


def test_link_that_is_slow_is_kept_while_bytes_move() -> None:
    def slowly(proxy: Proxy, connection: CountingConnection) -> None:
        proxy.pause_s = 0.1  # 40 kB a second: this message needs longer than the limit, and no pong overtakes it
        asyncio.get_running_loop().create_task(connection.send(bytes(200_000)))

    assert talk(slowly, silence_limit_s=0.6) >= 3.0
