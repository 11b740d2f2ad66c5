"""The pipe's benchmark: frames of its size travel to a real service, and what it times is their bytes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from splitfl.errors import LinkError, RefusedError
from splitfl.lab.bench import pipe
from splitfl.lab.bench.pipe import FRAME_BYTES, UNDER_WAY, run, through_shells, through_tcp
from splitfl.wire.messages import Release


class FakeLink:
    """Refuses everything, in ten milliseconds of the clock."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.sent = error, 0

    def request(self, message: Release) -> Future[Any]:
        assert message.hidden.nbytes == FRAME_BYTES
        self.sent += 1
        answer: Future[Any] = Future()
        answer.set_exception(self.error) if self.error else answer.set_result(None)
        return answer


def test_rate_counts_every_frame_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    link = FakeLink(RefusedError("no", code="bad_message"))
    assert through_shells(link, 5) == pytest.approx(5 * FRAME_BYTES / 1e9)  # type: ignore[arg-type]
    assert link.sent == 5 > UNDER_WAY


def test_answer_that_was_not_meant_ends_the_benchmark() -> None:
    with pytest.raises(LinkError):
        through_shells(FakeLink(LinkError("gone")), 3)  # type: ignore[arg-type]
    with pytest.raises(LinkError, match="fits no model"):
        through_shells(FakeLink(None), 3)  # type: ignore[arg-type]


def test_bare_socket_carries_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "FRAME_BYTES", 1 << 16)
    assert through_tcp(3) > 0


def test_real_service_refuses_every_frame() -> None:
    result = run(frames=3, runs=1)
    assert [row["what"] for row in result.rows] == ["raw TCP", "frames through both shells"]
    assert all(row["GB_per_s"]["median"] > 0 for row in result.rows)
    assert [bar.bar for bar in result.bars] == [0.8]
