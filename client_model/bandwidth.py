"""How fast the link to the server is, through the very websocket that training uses: round trip, up and down.

What travels is zeros, thrown away at the other end. More of them are sent until they take long enough to be told from
the round trip, so that a slow link is not kept busy and a fast one has left its slow start behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from client_model.asking import Asker
from client_model.timing import Spread
from splitfl.errors import ProtocolError
from splitfl.planning.capability import LinkSpeed
from splitfl.wire.messages import Echo, Echoed, TensorBytes

PIECE_BYTES = 256 << 10
MOST_PIECES, A_FEW_PIECES = 32, 4  # 8 MiB to plan by, 1 MiB to see whether that still holds
LONG_ENOUGH_S = 0.2
ROUND_TRIPS, RUNS = 7, 3


@dataclass(frozen=True)
class LinkGauge:
    """Round trip in seconds; up and down in bytes a second."""

    rtt: Spread
    up: Spread
    down: Spread

    @classmethod
    def of(cls, speed: LinkSpeed) -> LinkGauge:
        """One that somebody told."""
        return cls(*(Spread.of([value]) for value in (speed.rtt_s, speed.up, speed.down)))

    @property
    def speed(self) -> LinkSpeed:
        """What a plan reckons with: the medians."""
        return LinkSpeed(self.rtt.median, self.up.median, self.down.median)


def measure_link(link: Asker, most_pieces: int = MOST_PIECES) -> LinkGauge:
    """A second or two of echoes, of ``most_pieces`` at once. Raises whatever a request raises."""
    echo_s(link, 1, 0, 0)  # the first one finds everything cold
    rtt = Spread.of([echo_s(link, 1, 0, 0) for _ in range(ROUND_TRIPS)])
    up, down = (rate(link, rtt, most_pieces, sent, PIECE_BYTES - sent) for sent in (PIECE_BYTES, 0))
    return LinkGauge(rtt, up, down)


def rate(link: Asker, rtt: Spread, most_pieces: int, sent: int, wanted: int) -> Spread:
    """Bytes a second of pieces that are ``sent`` or ``wanted``."""
    pieces = 1
    while True:
        taken = echo_s(link, pieces, sent, wanted)
        if taken - rtt.median >= LONG_ENOUGH_S or pieces >= most_pieces:
            break
        pieces *= 2
    times = [taken]
    while len(times) < RUNS and sum(times) < RUNS * LONG_ENOUGH_S:
        times.append(echo_s(link, pieces, sent, wanted))
    beyond = [max(taken - rtt.median, taken / 10) for taken in times]  # round trips vary too
    return Spread.of([pieces * PIECE_BYTES / seconds for seconds in beyond])


def echo_s(link: Asker, pieces: int, sent: int, wanted: int) -> float:
    """Seconds until ``pieces`` echoes, asked for at once, are there: each has ``sent`` bytes up, ``wanted`` down."""
    data = TensorBytes("u8", (sent,), bytes(sent))
    began = time.perf_counter()
    for reply in [link.request(Echo(0, 0, data, wanted)) for _ in range(pieces)]:
        if not isinstance(answer := reply.result(), Echoed):
            raise ProtocolError(f"{type(answer).__name__} instead of an echo")
    return time.perf_counter() - began
