"""``splitfl bench planner``: its bars, its picture, and a process under a real limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from splitfl.errors import SplitFLError
from splitfl.lab.bench import planner
from splitfl.lab.bench.cli import draw
from splitfl.lab.bench.harness import Result
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
    held = bytearray(int(sys.argv[1]) << 20)
except MemoryError:
    print(json.dumps({"event": "memory_short", "pieces": 2}))
time.sleep(0.3)  # for whoever looks at it
"""


@pytest.mark.parametrize(("wanted", "shortages"), [(16, 0), (512, 1)])
def test_limit_is_a_real_one_and_steps_that_are_done_again_count_once(wanted: int, shortages: int) -> None:
    outcome = run_limited([sys.executable, "-c", CHILD, str(wanted)], 256 * MIB)
    assert (outcome.steps, outcome.shortages) == (5, shortages)
    assert (outcome.peak > wanted * MIB) == (shortages == 0)
    assert outcome.step_s > 0


def test_client_that_hardly_began_is_an_error() -> None:
    with pytest.raises(SplitFLError, match="made 0 steps"):
        run_limited([sys.executable, "-c", "raise SystemExit('no memory for torch')"], 256 * MIB)


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
    assert sum(steps == planner.SURVIVED for _, steps in asked) == 2
    assert all(bar.holds for bar in result.bars)
