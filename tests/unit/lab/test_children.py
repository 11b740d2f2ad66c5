"""The demo's processes: failures are told with their own words, and nothing stays behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from splitfl.errors import DataError, SplitFLError
from splitfl.lab.demo.children import Children, interrupts_put_off
from splitfl.lab.peaks import peak_rss

SLEEP = ("timeit", "-n", 1, "-r", 1, "import time; time.sleep(60)")


def test_failure_of_a_child_is_raised_in_its_own_words(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    with Children(tmp_path) as children:
        children.start("sleeper", *SLEEP)
        join = ("join", "ws://127.0.0.1:9", "--name", "a", "--data", missing, "--state", tmp_path / "a")
        children.start("oncology", "splitfl.cli", *join)
        with pytest.raises(SplitFLError, match=f"oncology failed: there is no {missing}") as caught:
            list(children.events())
    assert caught.value.exit_code == DataError.exit_code
    assert str(tmp_path / "oncology.log") in caught.value.remedy


def test_children_end_with_the_block_even_after_an_interrupt(tmp_path: Path) -> None:
    children = Children(tmp_path)

    def interrupted() -> None:
        with children:
            children.start("sleeper", *SLEEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (sleeper,) = children.all
    assert sleeper.process.returncode is not None
    assert not psutil.pid_exists(sleeper.process.pid)


def test_interrupt_waits_until_a_started_child_is_noted_down() -> None:
    seen = []

    def interrupted() -> None:
        with interrupts_put_off():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("the block went on")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == ["the block went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_events_end_when_every_child_has_ended_well(tmp_path: Path) -> None:
    program = "print('{\"event\": \"hello\"}'); print('not an event')"
    with Children(tmp_path) as children:
        for name in ("a", "b"):
            children.start(name, "timeit", "-n", 1, "-r", 1, program)
        assert sorted(children.events(), key=lambda pair: pair[0]) == [
            ("a", {"event": "hello"}),
            ("b", {"event": "hello"}),
        ]


def test_peak_rss_is_that_of_the_process_itself(tmp_path: Path) -> None:
    """Not of the large one that started it, as ``ru_maxrss`` would have it."""
    ballast = bytearray(200_000_000)
    ballast[::4096] = bytes(len(ballast[::4096]))
    with Children(tmp_path) as children:
        children.start("short", "timeit", "-n", 1, "-r", 1, "import time; time.sleep(0.5)")
        list(children.events())
        assert 1_000_000 < children.peak_rss()["short"] < 100_000_000


def test_peak_rss_of_a_process_that_has_gone_is_zero() -> None:
    assert peak_rss(2**22 + 1) == 0
