"""A client that is alive but late: where the federation has set a deadline, the others go on without it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disturbing import SETTINGS, start
from processes import Command, Place, with_settings


@contextmanager
def frozen(command: Command) -> Iterator[None]:
    """The process stands still; its connection does not break."""
    os.kill(command.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(command.pid, signal.SIGCONT)


def few_rounds(**changes: Any) -> dict[str, dict[str, Any]]:
    return with_settings(SETTINGS, **{"rounds": {"count": 2, "min_clients": 2}, **changes})


def assert_all_end(*commands: Command) -> None:
    for command in commands:
        assert command.wait() == 0, command.story()
        assert "Traceback" not in command.stderr, command.story()


def test_step_deadline_drops_the_late_client_which_goes_on_later(place: Place, wards: dict[str, Path]) -> None:
    server, (first, second) = start(place, wards, few_rounds(trunk={"step_deadline_s": 1.5}))
    second.wait_for("step", round=0, step=5)
    with frozen(second):
        first.wait_for("step", count=len(first.named("step")) + 3)
    assert_all_end(first, second, server.command)
    missed = second.named("step_missed", round=0)
    assert missed
    assert "went on without this one" in missed[0]["reason"]
    assert len(first.named("step")) == 60
    assert second.named("step", round=1)
    assert [event["clients"] for event in server.command.named("round_durable")] == [["a", "b"]] * 2


@pytest.mark.parametrize("mode", ["client-batch", "sequential"])
def test_round_deadline_merges_without_the_late_client_which_takes_part_in_the_next(
    place: Place, wards: dict[str, Path], mode: str
) -> None:
    settings = few_rounds(
        rounds={"count": 3, "local_steps": 10, "min_clients": 2, "deadline_s": 2.0},
        trunk={"mode": mode, "step_deadline_s": 0.3},
    )
    server, (first, second) = start(place, wards, settings)
    second.wait_for("step", round=0, step=1)
    with frozen(second):
        server.command.wait_for("round_durable", round=0)
    assert_all_end(first, second, server.command)
    assert server.command.named("round_durable", round=0)[0]["clients"] == ["a"]
    assert second.named("round_durable", merged=False)
    assert "b" in server.command.named("round_durable")[-1]["clients"]


def test_round_deadline_alone_frees_those_who_wait_in_a_step(place: Place, wards: dict[str, Path]) -> None:
    settings = few_rounds(rounds={"count": 2, "local_steps": 10, "min_clients": 2, "deadline_s": 3.0})
    server, (first, second) = start(place, wards, settings)
    second.wait_for("step", round=0, step=1)
    with frozen(second):  # no deadline for steps: the first client waits for it, and neither can send an update
        server.command.wait_for("round_durable", round=0)
    assert_all_end(first, second, server.command)
    assert server.command.named("late_in_step", round=0)[0]["client"] == "b"
    assert server.command.named("round_durable", round=0)[0]["clients"] == ["a"]
    assert len(first.named("step", round=0)) == 10
