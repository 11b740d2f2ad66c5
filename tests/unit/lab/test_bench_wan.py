"""The link's benchmark: both ways train the same, every byte is counted, and the bound is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.lab.bench import wan
from splitfl.lab.bench.harness import Result
from splitfl.lab.bench.plots import draw_timeline
from splitfl.lab.bench.wan import Scale, Step, bars, carried, run, shares
from splitfl.lab.link_emulator import Log, Passage

QUICK = Scale(
    rtt_s=0.01, up=8e5, down=8e5, hidden=64, vocab=300, records=16, micro_batches=8, length=16, epochs=2, in_flight=4
)


@pytest.fixture(scope="module")
def result() -> Result:
    threads = torch.get_num_threads()
    measured = run(scale=QUICK)
    assert torch.get_num_threads() == threads
    return measured


def test_both_ways_train_the_same_and_the_default_sends_less(result: Result) -> None:
    naive, default, _ = result.rows
    assert default["last_loss"] == pytest.approx(naive["last_loss"], rel=1e-3)
    assert naive["last_loss"] < naive["first_loss"]
    activations = 4 * QUICK.records * QUICK.length * QUICK.hidden / 1e6  # MB in fp32, as many as gradients
    assert naive["MB_up_first_epoch"] == pytest.approx(2 * activations, rel=0.15)
    assert naive["MB_up_last_epoch"] == pytest.approx(2 * activations, rel=0.15)
    assert naive["MB_down_last_epoch"] == pytest.approx(activations, rel=0.15)
    assert default["MB_up_first_epoch"] < 0.5 * naive["MB_up_first_epoch"]
    assert default["MB_up_last_epoch"] < 0.75 * default["MB_up_first_epoch"]


def test_no_way_is_faster_than_its_bound(result: Result) -> None:
    for row in result.rows[:2]:
        assert 0 < row["share_of_bound"] <= 1.0
        assert row["bound_s"] >= max(row["up_s"], row["down_s"], row["client_s"], row["trunk_s"])
    assert [bar.better for bar in result.bars] == ["higher", "higher", "lower", "lower", "lower"]


def test_both_directions_are_drawn(result: Result) -> None:
    for lanes in result.drawn.values():
        assert all(began < left for way in ("up", "down") for began, left in lanes[way])
        assert lanes["up"]
        assert lanes["down"]


def test_picture_and_json_hold_both_timelines(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "run", lambda **_: result)
    ended = CliRunner().invoke(app, ["bench", "wan", "--out", str(tmp_path)])
    assert ended.exit_code == 0
    assert "what=naive" in ended.stdout
    assert "bound / time of the default" in ended.stdout
    kept = json.loads((tmp_path / "wan.json").read_text())
    assert set(kept["drawn"]) == {"naive", "default"}
    assert set(kept["drawn"]["naive"]) == {"step_s", "times", "client", "up", "trunk", "down"}
    assert (tmp_path / "wan.png").stat().st_size > 10_000


def test_bytes_of_a_step_are_those_that_left_within_it() -> None:
    log = Log()
    for began in (0.5, 1.5, 2.5, 3.5):
        log.add(Passage(began, began + 0.1, began + 0.2), 10)
    assert carried(log, Step(began=1.0, ended=3.0, loss=0.0, client_s=0.0, trunk_s=0.0)) == 20


def test_shares_are_seconds_of_computing_a_second() -> None:
    assert shares([0.0, 1.0, 3.0], [5.0, 5.5, 7.5]) == [0.5, 1.0]


def row(**changed: float) -> dict[str, Any]:
    return {"seconds": 10.0, "share_of_bound": 0.9, "last_loss": 2.0, **changed}


def test_bars_compare_times_and_losses() -> None:
    emulated = {"rtt_error_s": -0.002, "up_error": 0.01, "down_error": -0.05}
    held = {bar.name: (bar.value, bar.holds) for bar in bars(row(seconds=120.0), row(last_loss=2.01), emulated)}
    assert held == {
        "naive / default, time to the same loss": (12.0, True),
        "bound / time of the default": (0.9, True),
        "last loss, default against naive, relative difference": (pytest.approx(0.005), True),
        "link emulator, error of the round trip in seconds": (0.002, True),
        "link emulator, relative error of the rates": (0.05, False),
    }


def test_timeline_is_drawn_on_the_scale_of_the_fastest(tmp_path: Path) -> None:
    lanes = {"step_s": 1.0, "times": [0.0, 0.5, 1.0], "client": [0.5, 1.5], "trunk": [0.0, 0.1]}
    lanes |= {"up": [[0.0, 0.4]], "down": []}
    drawn = {"naive": {**lanes, "step_s": 9.0}, "default": lanes}
    draw_timeline(Result("wan", {}, drawn=drawn), tmp_path / "wan.png")
    assert (tmp_path / "wan.png").stat().st_size > 10_000
