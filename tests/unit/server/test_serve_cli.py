"""What the operator reads: every event with its time, in JSON and in words, and who is waited for by name."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from server_model.cli import in_words, report_json, report_text
from server_model.coordinator import Progress


def test_json_event_carries_its_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    report_json(Progress("waiting_for", {"clients": ["a"], "missing": 0}))
    told = json.loads(capsys.readouterr().out)
    assert (told["event"], told["clients"]) == ("waiting_for", ["a"])
    said = datetime.fromisoformat(told["time"])
    assert said.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)


def test_line_for_the_operator_begins_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    report_text(Progress("round_open", {"round": 1, "cohort": ["a", "b"]}, time="2026-01-02T03:04:05.000+00:00"))
    assert capsys.readouterr().err == "2026-01-02T03:04:05.000+00:00 round 2 open for a, b\n"


@pytest.mark.parametrize(
    ("event", "facts", "words"),
    [
        ("waiting_for", {"clients": ["a", "b"], "missing": 0}, "waiting for a, b"),
        ("waiting_for", {"clients": ["a"], "missing": 2}, "waiting for a, 2 more to open a round"),
        (
            "late_update",
            {"client": "b", "round": 0, "kept": True},
            "b: its update of round 1 came late: the next",
        ),
        ("late_update", {"client": "b", "round": 0, "kept": False}, "b: its update of round 1 came late: dropped"),
        (
            "merge_refused",
            {"round": 1, "tensors": ["x", "y"]},
            "round 2: the merge of x, y would not be finite, so they stay as they were",
        ),
        ("disconnected", {"client": "b", "grace_s": 9.0}, "b disconnected"),
    ],
)
def test_events_in_words(event: str, facts: dict[str, object], words: str) -> None:
    assert in_words(event, facts).startswith(words)
