"""Budgets: bounds that were set beforehand hold for every unit, whoever a row is charged to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gates import open_gate, policy, ref

from splitfl.errors import PrivacyError
from splitfl.privacy.budget import Budget
from splitfl.privacy.ledger import EVERYTHING, Ledger, ReleaseKind, Row
from splitfl.privacy.policy import Workload


def row(record: bytes, cost: float, *, tainted: bool = False) -> Row:
    return Row(record, "activations", math.sqrt(cost), 1.0, 0, tainted, bytes(32), 1)


def budget(folder: Path, *rows: Row, unit: str = "record", bound: float = 1.0) -> Budget:
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.append(rows)
    chosen = policy("certified", unit=unit)
    return Budget(replace(chosen, record_budget=bound, run_budget=bound), ledger)


@pytest.mark.parametrize(
    ("spent", "asked", "allowed"),
    [
        ([], [row(b"a", 1.0)], True),
        ([], [row(b"a", 1.01)], False),
        ([row(b"a", 0.5)], [row(b"a", 0.5)], True),
        ([row(b"a", 0.5)], [row(b"a", 0.51)], False),
        ([row(b"b", 1.0)], [row(b"a", 1.0)], True),
        ([], [row(b"a", 0.6), row(b"b", 0.6)], True),
        ([], [row(b"a", 0.6), row(b"a", 0.6)], False),
        ([row(EVERYTHING, 0.6)], [row(b"a", 0.6)], False),
        ([row(b"b", 0.6, tainted=True)], [row(b"a", 0.6)], False),
        ([row(b"a", 0.6)], [row(EVERYTHING, 0.6)], False),
        ([row(b"a", 0.6)], [row(b"b", 0.6, tainted=True)], False),
        ([row(b"a", 0.6)], [row(EVERYTHING, 0.3), row(b"a", 0.3)], False),
        ([row(EVERYTHING, 2.0)], [row(EVERYTHING, 0.0)], True),
        ([row(EVERYTHING, math.inf)], [row(b"a", 0.1)], False),
    ],
)
def test_no_record_gets_past_its_bound(spent: list[Row], asked: list[Row], allowed: bool, tmp_path: Path) -> None:
    filter_ = budget(tmp_path, *spent)
    assert filter_.allows(asked) == allowed
    if not allowed:
        with pytest.raises(PrivacyError, match="budget is spent"):
            filter_.check(asked)


def test_a_clients_bound_is_for_all_its_records_together(tmp_path: Path) -> None:
    filter_ = budget(tmp_path, row(b"a", 0.5), unit="client")
    assert filter_.allows([row(b"b", 0.25), row(b"c", 0.25)])
    assert not filter_.allows([row(b"b", 0.25), row(b"c", 0.26)])


def test_without_a_target_nothing_is_refused(tmp_path: Path) -> None:
    assert budget(tmp_path, bound=math.inf).allows([row(EVERYTHING, math.inf)])


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_step_that_was_promised_can_be_paid_for_to_its_end(unit: str, tmp_path: Path) -> None:
    """Whoever is refused is refused before a step, never in the middle of one, after its gradients have left."""
    work = Workload(records=4, held_out=0, draws=8, steps=4, padded_length=8)
    gate = open_gate(tmp_path, "certified", work=work, gradients="noised", dp_sgd=True, unit=unit)
    tensor, steps = torch.randn(2, 8, 4), 0
    for step in range(20):
        may_take_part = gate.reserve()
        candidates = [ref(1 + (2 * step + n) % 4) for n in range(4)]
        picked = [record for record in candidates if may_take_part(record.key, 8, True)][:2]
        if len(picked) < 2:
            break
        gate.once.release(ReleaseKind.ACTIVATION, step, picked, lambda: tensor)
        gate.release(ReleaseKind.GRADIENT, step, tensor, picked)
        gate.charge_dp_sgd(step, picked)
        steps += 1
    assert steps == work.steps


def test_a_reservation_counts_what_it_has_promised_and_forgets_whom_it_refused(tmp_path: Path) -> None:
    work = Workload(records=2, held_out=0, draws=2, steps=1, padded_length=8)
    gate = open_gate(tmp_path, "certified", work=work, unit="client")
    may_take_part = gate.reserve()
    assert [may_take_part(ref(number).key, 8, True) for number in (1, 2, 3)] == [True, True, False]
    assert may_take_part.records == [ref(1), ref(2)]


def test_held_out_records_are_asked_for_their_activation_alone(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "certified", dp_sgd=True)
    first = gate.reserve()
    assert first(ref(1).key, 8, False)
    gate.once.release(ReleaseKind.HELD_OUT_ACTIVATION, 0, [ref(1)], lambda: torch.randn(1, 8, 4))
    gate.charge_dp_sgd(0, [ref(1)])
    assert gate.reserve()(ref(1).key, 8, False)  # paid for: no row
    assert not gate.reserve()(ref(1).key, 8, True)  # its part for DP-SGD is spent
