"""A client that asks for much and does not listen: it is not read any more, and the server's memory stays bounded."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
from raw_client import RawClient
from serving import ServiceThread
from websockets.exceptions import ConnectionClosed

from client_model.link import Link
from server_model.service import Line
from splitfl.config import Federation
from splitfl.wire.frames import Parts, encode
from splitfl.wire.messages import PROTOCOL_VERSIONS, Chunk, Fetch, Hello, TensorBytes, Upload
from splitfl.wire.session import CREDIT_WINDOW

PIECE_BYTES = 80_000
LIMIT_BYTES = 1_000_000
SEQS = 16  # that the deaf client asks for again and again
HEADER_BYTES = 1000  # of a piece, with its checksum, at most


@pytest.fixture
def most_waiting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that wait to be sent to the one client, each time that a frame has joined them."""
    waiting: list[int] = []
    put = Line.put

    def watched(line: Line, parts: Parts) -> None:
        put(line, parts)
        waiting.append(line.waiting_bytes)

    monkeypatch.setattr(Line, "put", watched)
    return waiting


@pytest.fixture
def service(small_model: Path, tmp_path: Path) -> Callable[..., ServiceThread]:
    """Starts a service that nobody trains with, and that lets few bytes wait."""

    def start(**options: float) -> ServiceThread:
        settings = Federation.model_validate({"rounds": {"min_clients": 9}, "trunk": {"grace_s": 5.0}})
        service = ServiceThread(small_model, settings, tmp_path, **options)
        service.service.frame_limit = LIMIT_BYTES
        return service

    return start


def shout(service: ServiceThread, client: RawClient, digest: str) -> None:
    """Ask for the same pieces again and again without reading, until too much waits, and as often once more."""
    line = service.service.lines[client.greeting.session]
    again = 0
    deadline = time.monotonic() + 30
    for seq in cycle(range(SEQS)):
        client.connection.send(b"".join(encode(Fetch(seq, 0, digest, 0, PIECE_BYTES))))
        again += line.waiting_bytes > LIMIT_BYTES
        if again >= 500:
            return
        assert time.monotonic() < deadline, f"{line.waiting_bytes} bytes wait"
        time.sleep(0.001)


def test_client_that_asks_and_does_not_listen_is_read_no_more(
    service: Callable[..., ServiceThread], most_waiting: list[int]
) -> None:
    with service() as running, RawClient(running.url, "deaf") as client:
        digest = running.coordinator.blobs.add_bytes(bytes(PIECE_BYTES))
        shout(running, client, digest)
        client.connection.send(b"".join(encode(Fetch(SEQS, 0, digest, 0, 1))))
        pieces = 0
        while (answer := client.hear()).seq != SEQS:  # it listens at last, and is heard again
            assert isinstance(answer, Chunk)
            pieces += 1
        assert pieces * PIECE_BYTES > LIMIT_BYTES
    assert LIMIT_BYTES < max(most_waiting) <= LIMIT_BYTES + (SEQS + 1) * (PIECE_BYTES + HEADER_BYTES)


def test_client_that_never_listens_is_silent_and_its_connection_ends(service: Callable[..., ServiceThread]) -> None:
    with service(silence_limit_s=0.6) as running, suppress(ConnectionClosed), RawClient(running.url, "deaf") as client:
        digest = running.coordinator.blobs.add_bytes(bytes(PIECE_BYTES))
        shout(running, client, digest)
        deadline = time.monotonic() + 30
        while running.service.lines:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_sides_that_both_send_more_than_their_sockets_hold_go_on(
    service: Callable[..., ServiceThread], most_waiting: list[int]
) -> None:
    """The server reads no more while its answers wait; they leave because the client reads while it cannot send."""
    piece = 900_000
    data = TensorBytes("u8", (piece,), bytes(piece))
    with service() as running:
        digest = running.coordinator.blobs.add_bytes(bytes(piece))
        link = Link(running.url, Hello(PROTOCOL_VERSIONS, "both"), say=lambda _: None)
        try:
            link.open()
            asked = []
            for _ in range(CREDIT_WINDOW // 2):
                asked.append(link.request(Fetch(0, 0, digest, 0, piece)))
                asked.append(link.request(Upload(0, 0, "ab" * 32, 0, 1, data)))  # refused, once it is there
            for fetched, refused in zip(asked[::2], asked[1::2], strict=True):
                assert isinstance(fetched.result(60), Chunk)
                assert refused.exception(60) is not None
        finally:
            link.close()
    assert max(most_waiting) > LIMIT_BYTES  # so that the server did stop reading
