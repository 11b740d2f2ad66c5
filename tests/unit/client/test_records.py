"""What a client trains on and what it measures with, from one file and the federation's settings."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from client_model.records import ClientData
from splitfl.config import parse_federation
from splitfl.data.packing import Batch
from splitfl.errors import DataError
from tests.unit.data.conftest import make_tokenizer

ROWS = [f"the cough of patient {number:03d}" for number in range(300)]


def opened(path: Path, bpe: Any, *, seed: int = 0, draw: int = 0) -> ClientData:
    tables = {
        "seed": seed,
        "batch": {"pack": False, "records": 4},
        "evaluation": {"held_out_fraction": 0.3, "records": 8, "seed": draw},
    }
    return ClientData.open(path, parse_federation(tables, "the test"), bpe)


@pytest.fixture(scope="module")
def bpe() -> Any:
    return make_tokenizer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in ROWS))
    return file


def measured(data: ClientData) -> list[list[int]]:
    return [row for batch in data.evaluation() for row in rows_of(batch)]


def rows_of(batch: Batch) -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(batch.input_ids, batch.lengths, strict=True)]


def test_measured_records_are_spread_over_the_file(path: Path, bpe: Any) -> None:
    data = opened(path, bpe)
    assert data.held_out is not None
    rows = [record.input_ids.tolist() for record in data.held_out]
    places = [rows.index(row) for row in measured(data)]
    assert len(places) == 8
    assert places[-1] >= len(rows) * 7 // 8
    assert all(0 < after - before <= len(rows) // 8 + 1 for before, after in pairwise(places))


def test_seed_of_the_training_leaves_the_held_out_rows_alone(path: Path, bpe: Any) -> None:
    assert measured(opened(path, bpe, seed=1)) == measured(opened(path, bpe, seed=2))
    assert measured(opened(path, bpe, draw=1)) != measured(opened(path, bpe, draw=2))


@pytest.mark.parametrize("mode", ["off", "measured"])
def test_too_few_records_for_a_step_are_refused_where_none_may_come_twice(tmp_path: Path, bpe: Any, mode: str) -> None:
    file = tmp_path / "short.csv"
    file.write_text("text\n" + "\n".join(ROWS[:3]))
    tables = {"batch": {"records": 4}, "evaluation": {"held_out_fraction": 0.0}, "privacy": {"mode": mode}}
    data = ClientData.open(file, parse_federation(tables, "the test"), bpe)
    if mode == "off":
        data.check_fills_a_step()
        return
    with pytest.raises(DataError, match=r"too few records to train on: 3, .* takes 4 different ones"):
        data.check_fills_a_step()


def test_what_the_server_is_told_of_private_records_hangs_on_their_buckets_alone(tmp_path: Path, bpe: Any) -> None:
    """Width, lengths and divisors are equal for records of other true lengths; with privacy off they are not."""
    told: dict[str, list[object]] = {"off": [], "measured": []}
    for mode, of_mode in told.items():
        for words in (2, 5):
            file = tmp_path / f"{words}.csv"
            file.write_text("text\n" + "\n".join(f"{number} " + "cough " * words for number in range(4)))
            tables = {
                "batch": {"records": 4, "max_length": 64, "buckets": (32, 64), "pack": False},
                "evaluation": {"held_out_fraction": 0.0},
                "privacy": {"mode": mode},
            }
            data = ClientData.open(file, parse_federation(tables, "the test"), bpe)
            if mode != "off":
                data.name_records(bytes(32))
            (batch,) = data.micro_batches(range(4))
            assert batch.lengths.max() <= 32
            of_mode.append((batch.input_ids.shape, batch.padded_lengths, batch.told_tokens))
    assert told["measured"] == [((4, 32), (32,) * 4, 4 * 32)] * 2
    assert told["off"][0] != told["off"][1]
