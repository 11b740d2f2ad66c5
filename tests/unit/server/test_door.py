"""The one port: TLS and plain websockets on it, junk on it, and more strangers than it has room for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from client_model.identity import client_context
from client_model.link import dial
from server_model import door as door_module
from server_model.admission import Peer
from server_model.authority import Authority, open_authority
from server_model.door import Door
from server_model.service import CountingConnection
from splitfl.channel.certificates import SERVER_NAME

WAIT_S = 20.0


class Hall:
    """An echo behind a door."""

    def __init__(self, authority: Authority, *, tls: bool = True) -> None:
        self.authority = authority
        self.door = Door(authority.server_context() if tls else None)
        self.peers: list[Peer] = []
        self.port = 0

    async def echo(self, connection: ServerConnection) -> None:
        self.door.known(connection)  # type: ignore[arg-type]
        self.peers.append(Peer.of(connection.transport))
        async for message in connection:
            await connection.send(message)

    async def ask(self, *, tls: bool) -> Any:
        context = client_context()
        context.load_verify_locations(cadata=self.authority.pem)
        async with dial(f"{'wss' if tls else 'ws'}://127.0.0.1:{self.port}", context if tls else None) as connection:
            await connection.send(b"hello")
            return await connection.recv()

    def knock(self, data: bytes = b"") -> socket.socket:
        stranger = socket.create_connection(("127.0.0.1", self.port))
        stranger.setblocking(False)
        stranger.send(data)
        return stranger

    async def hears_the_end(self, stranger: socket.socket) -> bool:
        with contextlib.suppress(ConnectionError):
            while await asyncio.get_running_loop().sock_recv(stranger, 4096):
                pass
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    @property
    def strangers(self) -> int:
        return len(self.door._strangers)


def in_hall(folder: Path, body: Callable[[Hall], Awaitable[None]], **options: bool) -> None:
    """Run ``body`` while the hall is open; afterwards nobody is left at its door."""

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Hall]:
        hall = Hall(open_authority(folder), **options)
        making: Any = partial(CountingConnection, hall.door)
        async with serve(hall.echo, "127.0.0.1", 0, compression=None, create_connection=making) as server:
            hall.port = next(iter(server.sockets)).getsockname()[1]
            yield hall
            await hall.until(lambda: not hall.strangers)
            hall.door.close()

    async def run() -> None:
        async with asyncio.timeout(WAIT_S), opened() as hall:
            await body(hall)

    asyncio.run(run())


def test_both_kinds_find_their_way(tmp_path: Path) -> None:
    async def body(hall: Hall) -> None:
        assert await hall.ask(tls=True) == b"hello"
        assert await hall.ask(tls=False) == b"hello"
        assert [peer.encrypted for peer in hall.peers] == [True, False]
        assert all(peer.loopback for peer in hall.peers)

    in_hall(tmp_path, body)


@pytest.mark.parametrize(
    ("address", "here"), [(("127.0.0.1", 5), True), (("::1", 5, 0, 0), True), (("10.0.0.7", 5), False), (None, False)]
)
def test_peer_over_loopback_is_known_by_its_address(address: tuple[object, ...] | None, here: bool) -> None:
    class Transport:
        def get_extra_info(self, name: str) -> object:
            return address if name == "peername" else None

    assert Peer.of(Transport()).loopback is here


def test_without_a_context_there_is_no_tls(tmp_path: Path) -> None:
    async def body(hall: Hall) -> None:
        assert await hall.ask(tls=False) == b"hello"
        with pytest.raises(ConnectionError):
            await hall.ask(tls=True)

    in_hall(tmp_path, body, tls=False)


@pytest.mark.parametrize("junk", [b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x00\xff" * 40, b"GET / HTTP/1.1\r\n\r\n"])
def test_junk_is_shown_out_and_others_come_in(tmp_path: Path, junk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "TLS_HANDSHAKE_S", 0.2)

    async def body(hall: Hall) -> None:
        stranger = hall.knock(junk)
        assert await hall.ask(tls=True) == b"hello"
        assert await hall.hears_the_end(stranger)
        stranger.close()

    in_hall(tmp_path, body)


def test_silence_is_shown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "FIRST_BYTE_S", 0.1)

    async def body(hall: Hall) -> None:
        stranger = hall.knock()
        assert await hall.hears_the_end(stranger)
        stranger.close()

    in_hall(tmp_path, body)


def test_who_hangs_up_at_once_leaves_nothing_behind(tmp_path: Path) -> None:
    async def body(hall: Hall) -> None:
        for data in (b"", b"\x16", b"G"):
            hall.knock(data).close()
        assert await hall.ask(tls=True) == b"hello"
        await hall.until(lambda: not hall.strangers)

    in_hall(tmp_path, body)


def test_oldest_stranger_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "MAX_STRANGERS", 3)

    async def body(hall: Hall) -> None:
        strangers = [hall.knock() for _ in range(5)]
        for gone in strangers[:2]:
            assert await hall.hears_the_end(gone)
        assert hall.strangers == 3
        assert await hall.ask(tls=True) == b"hello"
        for stranger in strangers:
            stranger.close()

    in_hall(tmp_path, body)


def test_request_that_comes_with_the_end_of_the_handshake_is_not_lost(tmp_path: Path) -> None:
    async def body(hall: Hall) -> None:
        loop = asyncio.get_running_loop()
        context = client_context()
        context.load_verify_locations(cadata=hall.authority.pem)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname=SERVER_NAME)
        raw = hall.knock()
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await loop.sock_sendall(raw, outgoing.read())
                incoming.write(await loop.sock_recv(raw, 65536))
        tls.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await loop.sock_sendall(raw, outgoing.read())  # Finished and the request in one
        incoming.write(await loop.sock_recv(raw, 65536))
        assert tls.read(12) == b"HTTP/1.1 101"
        raw.close()

    in_hall(tmp_path, body)
