"""The link emulator: its times are those of the link that it plays; what it is given arrives, whole and in order."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.errors import ConfigError
from splitfl.lab.link_emulator import Conditions, LinkEmulator, Log, Passage, Schedule

PLAIN = Conditions(rate=1000.0, delay_s=0.5)


def test_piece_leaves_at_the_rate_and_arrives_after_the_delay() -> None:
    schedule = Schedule(PLAIN)
    assert schedule.take(10.0, 250) == Passage(10.0, 10.25, 10.75)
    assert schedule.take(10.1, 500) == Passage(10.25, 10.75, 11.25)  # behind the first
    assert schedule.take(20.0, 1000) == Passage(20.0, 21.0, 21.5)  # the line was idle


def test_nothing_leaves_while_the_line_is_stalled() -> None:
    schedule = Schedule(Conditions(rate=1000.0, stall_every_s=2.0, stall_s=0.5), start=100.0)
    assert schedule.take(100.0, 1000).left == pytest.approx(101.0)
    assert schedule.take(101.0, 1000).left == pytest.approx(102.5)  # stalled from 101.5 to 102
    assert schedule.take(103.7, 100) == Passage(*map(pytest.approx, (104.0, 104.1, 104.1)))  # came in the next stall


PIECES = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5000)), min_size=1, max_size=40)


@given(PIECES, st.floats(0, 0.2), st.floats(0, 1), st.integers(0, 9))
def test_order_is_kept_and_the_rate_never_exceeded(
    pieces: list[tuple[float, int]], jitter: float, stall: float, seed: int
) -> None:
    conditions = Conditions(rate=1000.0, delay_s=0.1, jitter_s=jitter, stall_every_s=2.0, stall_s=stall)
    schedule, now, passages = Schedule(conditions, seed=seed), 0.0, []
    for pause, nbytes in pieces:
        now += pause
        passages.append((now, schedule.take(now, nbytes), nbytes))
    for came, passage, nbytes in passages:
        assert came <= passage.began + 1e-9
        assert passage.left - passage.began >= nbytes / 1000.0 - 1e-9
        assert passage.arrived - passage.left >= 0.1 - 1e-9
    for (_, one, _), (_, other, _) in pairwise(passages):
        assert one.left <= other.began + 1e-9
        assert one.arrived <= other.arrived


@given(st.integers(0, 2**31))
def test_jitter_is_bounded_and_repeats_with_its_seed(seed: int) -> None:
    conditions = Conditions(rate=1e9, delay_s=0.1, jitter_s=0.05)
    taken = [Schedule(conditions, seed=seed).take(0.0, 1) for _ in range(2)]
    assert taken[0] == taken[1]
    assert 0.1 <= taken[0].arrived <= 0.15 + 1e-6
    late = [Schedule(conditions, seed=seed + number).take(0.0, 1).arrived for number in range(20)]
    assert max(late) - min(late) > 0.01


def test_line_holds_what_is_on_its_way_and_the_queue() -> None:
    assert Conditions(rate=1000.0, delay_s=0.5, jitter_s=0.25, queue_bytes=100).window == 850


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": 1, "delay_s": -1}, {"rate": 1, "stall_s": 2, "stall_every_s": 2}]
)
def test_link_on_which_nothing_arrives_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="no link is like this"):
        Conditions(**wrong)  # type: ignore[arg-type]


def test_log_joins_what_is_sent_without_a_pause() -> None:
    log = Log()
    for passage in (Passage(0, 1, 2), Passage(1, 3, 4), Passage(5, 6, 7)):
        log.add(passage, 10)
    assert [(spell.began, spell.left, spell.arrived, spell.nbytes) for spell in log.spells] == [
        (0, 3, 4, 20),
        (5, 6, 7, 10),
    ]
    assert log.nbytes == 30


@contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


def url_of(server: socket.socket) -> str:
    return f"ws://127.0.0.1:{server.getsockname()[1]}"


def connect(emulator: LinkEmulator) -> socket.socket:
    host, port = emulator.url.removeprefix("ws://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_bytes_arrive_whole_in_order_and_no_sooner_than_they_could() -> None:
    fast, slow = Conditions(rate=1e8, delay_s=0.02), Conditions(rate=1e6, delay_s=0.03)
    up, down = bytes(range(256)) * 4000, b"x" * 100_000
    with listener() as server, LinkEmulator(url_of(server), fast, slow) as emulator, connect(emulator) as client:
        far, _ = server.accept()
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_all(far)))
        reader.start()
        client.sendall(up)
        client.shutdown(socket.SHUT_WR)
        reader.join(30)
        began = time.monotonic()
        far.sendall(down)
        far.close()
        assert read_all(client) == down
        took = time.monotonic() - began
    assert got == [up]
    assert took >= 0.129  # 0.1 s at the rate, and the delay
    assert (emulator.up.nbytes, emulator.down.nbytes) == (len(up), len(down))


def test_round_trip_and_rate_are_those_that_were_asked_for() -> None:
    """The best of a few tries, with room for a busy machine; `splitfl bench wan` has the narrow bars."""
    way = Conditions(rate=5e6, delay_s=0.02)
    with listener() as server, LinkEmulator(url_of(server), way, way) as emulator, connect(emulator) as client:
        far, _ = server.accept()
        round_trips, rates = [], []
        for _ in range(5):
            began = time.monotonic()
            client.sendall(b"?")
            far.sendall(far.recv(1))
            client.recv(1)
            round_trips.append(time.monotonic() - began)
        for _ in range(3):
            began, left = time.monotonic(), 500_000
            threading.Thread(target=client.sendall, args=(bytes(left),)).start()
            while left:
                left -= len(far.recv(1 << 16))
            rates.append(500_000 / (time.monotonic() - began - 0.02))
        far.close()
    assert 0.04 <= min(round_trips) < 0.06
    assert max(rates) == pytest.approx(5e6, rel=0.15)


def test_sender_is_held_back_when_the_queue_is_full() -> None:
    crawl = Conditions(rate=1.0, delay_s=0.0, queue_bytes=1)
    with listener() as server, LinkEmulator(url_of(server), crawl, crawl) as emulator, connect(emulator) as client:
        far, _ = server.accept()
        client.setblocking(False)
        sent, quiet_since = 0, time.monotonic()
        while time.monotonic() - quiet_since < 0.3:
            try:
                sent += client.send(bytes(1 << 16))
                quiet_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        far.close()
    assert 0 < sent < 16 << 20  # the kernel's buffers at most
