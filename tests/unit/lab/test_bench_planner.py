"""``splitfl bench planner``: its bars, its picture, and a process under a real limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from splitfl.errors import SplitFLError
from splitfl.lab.bench import limits, planner
from splitfl.lab.bench.cli import draw
from splitfl.lab.bench.harness import Result
from splitfl.lab.bench.limits import MemoryLimit
from splitfl.lab.bench.planner import Outcome, bars, run_limited

MIB = 1 << 20


def row(cut: str, peak: float, step: float, *, steps: int = 8, survived: bool = True) -> dict[str, Any]:
    ratios = {"peak_ratio": peak, "step_ratio": step, "steps": steps, "survived": survived}
    told = {"predicted_peak": 400 * MIB, "peak": 400 * MIB * peak, "predicted_step_s": 0.5, "step_s": 0.5 * step}
    return {"model": "llama", "cut": cut, **ratios, **told}


def test_bars_are_of_the_worst_row_in_either_direction() -> None:
    values = [bar.value for bar in bars([row("0,0", 0.8, 1.1), row("1,1", 1.1, 1.3, steps=50)])]
    assert values == pytest.approx([0.2, 0.3, 1.0, 50])
    values = [bar.value for bar in bars([row("0,0", 1, 1), row("1,1", 1, 1, steps=50, survived=False)])]
    assert values == pytest.approx([0, 0, 0.5, 8])


def test_picture_is_drawn(tmp_path: Path) -> None:
    draw(Result("planner", {}, [row("0,0", 0.9, 1.1), row("1,1", 1.1, 1.3)]), tmp_path)
    assert (tmp_path / "planner.png").read_bytes().startswith(b"\x89PNG")


CHILD = """
import json, sys, time
for step in (0, 1, 1, 2, 3, 4):
    print(json.dumps({"event": "step", "step": step}), flush=True)
    time.sleep(0.01)
try:
    held = bytearray(b"x") * (int(sys.argv[1]) << 20)
except MemoryError:
    print(json.dumps({"event": "memory_short", "pieces": 2}))
time.sleep(0.3)  # for whoever looks at it
"""
FREE = MemoryLimit("none", lambda: None)


def test_steps_that_are_done_again_count_once() -> None:
    outcome = run_limited([sys.executable, "-c", CHILD, "16"], FREE)
    assert (outcome.steps, outcome.shortages) == (5, 0)
    assert outcome.peak > 16 * MIB
    assert outcome.step_s > 0


def test_client_that_met_its_limit_and_went_on_has_not_lived_under_it() -> None:
    with limits.data_limit(256 * MIB) as limit:
        outcome = run_limited([sys.executable, "-c", CHILD, "512"], limit)
    assert (outcome.steps, outcome.shortages) == (5, 1)


def test_client_that_hardly_began_is_an_error() -> None:
    with pytest.raises(SplitFLError, match="made 0 steps"):
        run_limited([sys.executable, "-c", "raise SystemExit('no memory for torch')"], FREE)


def test_every_cut_of_both_models_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    class Quick:
        def __init__(self, _work: Path, shape: planner.Shape) -> None:
            self.family = shape.family

        def measure(self, cut: str, steps: int) -> dict[str, Any]:
            asked.append((cut, steps))
            return row(cut, 1.0, 1.0, steps=Outcome(steps, 0.5, 0, MIB).steps)

    monkeypatch.setattr(planner, "Bench", Quick)
    result = planner.run()
    assert len(asked) == len(result.rows) >= 12
    assert sum(steps == planner.SURVIVED for _, steps in asked) == 1
    assert all(bar.holds for bar in result.bars)
