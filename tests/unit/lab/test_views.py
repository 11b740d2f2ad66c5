"""The demo's progress: what a person sees while the processes work."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from splitfl.lab.demo.views import Event, FederationView, Screen, TrainingView

CLIENTS = ("cardiology", "oncology", "paediatrics")
STEP = {"round": 2, "step": 5, "loss": 1.234, "tokens_per_s": 2911.2, "bytes_sent": 112_345_678, "bytes_received": 9e7}
EVENTS: list[tuple[str, Event]] = [
    ("trunk", {"event": "listening", "url": "ws://127.0.0.1:7000"}),
    ("oncology", {"event": "evaluation", "round": 0, "loss": 3.5}),
    ("trunk", {"event": "round_open", "round": 2}),
    ("oncology", {"event": "step", **STEP}),
    ("oncology", {"event": "evaluation", "round": 3, "loss": 2.25}),
    ("oncology", {"event": "step", **STEP}),
]


def shown(*, terminal: bool) -> tuple[str, list[tuple[str, Event]]]:
    """What the screen printed for ``EVENTS``, and what was passed on."""
    taken: list[tuple[str, Event]] = []
    console = Console(file=StringIO(), width=80, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
    view = FederationView(CLIENTS, rounds=8, local_steps=16)
    Screen(console).follow(iter(EVENTS), view, lambda name, event: taken.append((name, event)))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue(), taken


@pytest.mark.parametrize("terminal", [True, False])
def test_screen_passes_every_event_on(terminal: bool) -> None:
    assert shown(terminal=terminal)[1] == EVENTS


def test_screen_draws_a_table_that_fits_80_columns() -> None:
    text, _ = shown(terminal=True)
    assert "round 3 of 8" in text
    assert "…" not in text
    for expected in (
        "paediatrics",
        "step 6/16",
        "tokens/s",
        "received",
        "3.50 → 2.25",
        "1.234",
        "2,911",
        "112.3 MB",
        "90.0 MB",
    ):
        assert expected in text


def test_screen_prints_lines_away_from_a_terminal() -> None:
    lines = [" ".join(line.split()) for line in shown(terminal=False)[0].splitlines()]
    assert lines == [
        "the trunk listens on ws://127.0.0.1:7000",
        "before round 1 oncology held-out loss 3.500",
        "after round 3/8 oncology held-out loss 2.250 training loss 1.234 2,911 tokens/s "
        "112.3 MB sent 90.0 MB received",
    ]


def test_training_view_tells_of_few_steps() -> None:
    view = TrainingView({"base": "base model"}, {"base": 100}, lines=4)
    steps = ({"event": "step", "model": "base", "step": n, "loss": 1.0, "tokens_per_s": 5.0} for n in range(100))
    lines = [line for line in (view.handle("base", step) for step in steps) if line]
    assert [line.split()[3] for line in lines] == ["25/100", "50/100", "75/100", "100/100"]
