"""The link's speed from echoes, over a link of known speed whose clock moves by what crosses it."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from client_model import bandwidth
from client_model.bandwidth import A_FEW_PIECES, MOST_PIECES, PIECE_BYTES, LinkGauge, measure_link
from splitfl.errors import ProtocolError
from splitfl.planning.capability import LinkSpeed
from splitfl.wire.messages import Answer, Echo, Echoed, Farewell, Request, TensorBytes


class KnownLink:
    """Answers each request after a round trip, and one piece after another at its rates."""

    def __init__(self, speed: LinkSpeed) -> None:
        self.speed = speed
        self.now, self.busy = 0.0, 0.0
        self.bytes = 0

    def perf_counter(self) -> float:
        self.busy = self.now
        return self.now

    def request(self, message: Request) -> Future[Answer]:
        assert isinstance(message, Echo)
        self.bytes += message.data.nbytes + message.want
        self.busy += message.data.nbytes / self.speed.up + message.want / self.speed.down
        self.now = self.busy + self.speed.rtt_s  # when its answer is there, for whoever waits
        reply: Future[Answer] = Future()
        reply.set_result(Echoed(0, TensorBytes("u8", (message.want,), bytes(message.want))))
        return reply

    def again(self, message: Request) -> None: ...


@pytest.mark.parametrize(
    "speed", [LinkSpeed(0.05, 2.5e6, 12.5e6), LinkSpeed(0.001, 1e8, 2e8), LinkSpeed(0.3, 3e4, 1e5)]
)
def test_speeds_are_told_from_the_round_trip(speed: LinkSpeed, monkeypatch: pytest.MonkeyPatch) -> None:
    link = KnownLink(speed)
    monkeypatch.setattr(bandwidth, "time", link)
    gauge = measure_link(link)
    measured = gauge.speed
    assert measured.rtt_s == pytest.approx(speed.rtt_s)
    assert (measured.up, measured.down) == (pytest.approx(speed.up), pytest.approx(speed.down))
    assert gauge.up.low <= gauge.up.median <= gauge.up.high


def test_slow_link_is_kept_busy_for_one_piece_each_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    link = KnownLink(LinkSpeed(0.1, 1e5, 1e5))
    monkeypatch.setattr(bandwidth, "time", link)
    measure_link(link)
    assert link.bytes == 2 * PIECE_BYTES


@pytest.mark.parametrize("most", [MOST_PIECES, A_FEW_PIECES])
def test_fast_link_is_measured_with_no_more_than_it_may_be(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    link = KnownLink(LinkSpeed(0.0, 1e12, 1e12))
    monkeypatch.setattr(bandwidth, "time", link)
    measure_link(link, most)
    assert link.bytes <= 2 * PIECE_BYTES * most * (2 + bandwidth.RUNS)


def test_other_answer_than_an_echo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    link = KnownLink(LinkSpeed(0.0, 1.0, 1.0))
    reply: Future[Answer] = Future()
    reply.set_result(Farewell(0))
    monkeypatch.setattr(link, "request", lambda _: reply)
    with pytest.raises(ProtocolError, match="Farewell instead of an echo"):
        measure_link(link)


def test_gauge_of_a_speed_that_was_told_is_that_speed() -> None:
    assert LinkGauge.of(LinkSpeed(0.1, 2.0, 3.0)).speed == LinkSpeed(0.1, 2.0, 3.0)
