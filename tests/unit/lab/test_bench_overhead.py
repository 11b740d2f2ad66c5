"""The overhead benchmark at a tiny size: every mode against a whole model that trains the same, over a real service."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfl.lab.bench.overhead import (
    BURST,
    MODES,
    Mode,
    Size,
    measure,
    measure_parts,
    new_records,
    parse_settings,
    random_batch,
)
from splitfl.lab.bench.parts import PARTS, Parts
from splitfl.lab.bench.whole import WholeStep

TINY = Size(hidden=64, layers=3, vocab=300, records=2, length=16)
PRIVATE = next(mode for mode in MODES if mode.private)


def test_split_and_whole_train_the_same(tiny_llama: Path) -> None:
    row = measure(tiny_llama, MODES[0], TINY, 1)
    assert row["largest_loss_difference"] < 1e-5
    assert all(row[f"{name}_s"]["median"] > 0 for name in ("plain", "fused", "split"))
    assert row["ratio_to_plain"]["median"] == pytest.approx(row["split_s"]["median"] / row["plain_s"]["median"])


def test_private_steps_are_all_paid_for(tiny_llama: Path) -> None:
    row = measure(tiny_llama, PRIVATE, TINY, 1)
    assert row["ledger_rows"] >= 2 * BURST * TINY.records  # activations, and gradients beside them


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.frozen], ids=lambda mode: mode.name)
def test_no_step_meets_a_record_that_the_trunk_knows(mode: Mode) -> None:
    settings = parse_settings(mode.settings(TINY))
    first, second = (new_records(random_batch(2, 16, 300), step, settings) for step in range(2))
    if settings.privacy.on:
        assert not {*first.keys} & {*second.keys}
    else:
        assert (first.input_ids != second.input_ids).any(axis=1).all()


def test_parts_alone_are_a_step_of_the_whole(tiny_llama: Path) -> None:
    mode = MODES[0]
    batch, settings = random_batch(2, 16, 300), parse_settings(mode.settings(TINY))
    parts, whole = Parts(tiny_llama, settings), WholeStep(tiny_llama, fused=True)
    assert [parts(batch) for _ in range(3)] == pytest.approx([whole(batch)[1] for _ in range(3)], rel=1e-5)
    row = measure_parts(tiny_llama, mode, TINY, 2)
    every = [row[f"{name}_s"]["median"] for name in PARTS]
    assert min(every) > 0
    assert row["parts_s"]["max"] >= max(every)
