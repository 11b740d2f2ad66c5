"""The scale benchmark at a tiny size: real processes and sockets, rows, a bar and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.lab.bench import scale
from splitfl.lab.bench.crowd import Crowd
from splitfl.lab.bench.harness import Result
from splitfl.lab.bench.overhead import random_batch
from splitfl.lab.bench.scale import Size, joined

FEW = Crowd(connected=8, active=2, steps=2, records=1, length=8)
TINY = Size(hidden=64, layers=3, vocab=300, records=2, length=16, clients=(2,), repeats=2, burst=2, crowd=FEW)


@pytest.fixture(scope="module")
def measured() -> Result:
    return scale.run(size=TINY)


def test_every_number_of_clients_has_its_rates(measured: Result) -> None:
    rows = [row for row in measured.rows if "clients" in row]
    assert [row["clients"] for row in rows] == [2]
    for row in rows:
        for kind in ("split_tokens_per_s", "whole_tokens_per_s", "ratio"):
            assert 0 < row[kind]["min"] <= row[kind]["median"] <= row[kind]["max"]


def test_bar_judges_the_most_clients(measured: Result) -> None:
    bar = measured.bars[0]
    assert "2 clients" in bar.name
    assert (bar.value, bar.bar, bar.better) == (measured.rows[0]["ratio"]["median"], 0.95, "higher")


def test_clients_that_wait_cost_little_and_are_answered(measured: Result) -> None:
    row = measured.rows[-1]
    assert (row["connected"], row["active"]) == (8, 2)
    assert row["answers"] > 0
    assert row["status_99th_s"] > 0
    memory, answer = measured.bars[1:]
    assert (memory.value, memory.bar, memory.holds) == (row["idle_client_bytes"], 1 << 20, True)
    assert (answer.value, answer.bar) == (row["status_99th_s"], 0.1)


def test_command_writes_table_and_picture(measured: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "run", lambda **_: measured)
    ended = CliRunner().invoke(app, ["bench", "scale", "--out", str(tmp_path)])
    assert ended.exit_code == 0
    assert json.loads((tmp_path / "scale.json").read_text())["config"]["clients"] == [2]
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_whole_model_trains_on_the_batches_of_all_clients() -> None:
    batches = [random_batch(2, 16, 300, seed) for seed in range(3)]
    union = joined(batches)
    assert union.input_ids.shape == (6, 16)
    assert np.array_equal(union.labels[2:4], batches[1].labels)
    assert not np.array_equal(union.input_ids[:2], union.input_ids[2:4])
