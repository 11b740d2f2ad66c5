"""What releases cost: the same rows before a step and when it is paid, and what taints them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from gates import open_gate, policy, ref

from splitfl.privacy.charges import MOST_LOSS, Leaving, rows_of, step_rows, tainted
from splitfl.privacy.ledger import EVERYTHING, ReleaseKind, Row

RECORDS = [ref(1), ref(2, 4), ref(3)]
FLAGS = [False, True]


def priced(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(row.record, row.kind, row.sensitivity, row.sigma, row.tainted) for row in rows]


@pytest.mark.parametrize(
    ("unit", "dp_sgd", "noised", "bottom_trains"), list(itertools.product(["record", "client"], FLAGS, FLAGS, FLAGS))
)
def test_what_is_set_aside_for_a_step_is_what_it_is_charged(
    unit: str, dp_sgd: bool, noised: bool, bottom_trains: bool, tmp_path: Path
) -> None:
    """Else a step could begin that cannot be paid for, after its gradients have left."""
    gradients = "noised" if noised else "none"
    gate = open_gate(tmp_path, "measured", unit=unit, dp_sgd=dp_sgd, gradients=gradients, bottom_trains=bottom_trains)
    reserved = step_rows(gate.policy, RECORDS, RECORDS, trains=True)
    tensor = torch.randn(3, 8, 4)
    if bottom_trains:
        gate.release(ReleaseKind.ACTIVATION, 0, tensor, RECORDS)
    else:
        gate.once.release(ReleaseKind.ACTIVATION, 0, RECORDS, lambda: tensor)
    if noised:
        gate.release(ReleaseKind.GRADIENT, 0, tensor, RECORDS)
    if dp_sgd:
        gate.charge_dp_sgd(0, RECORDS)
    assert priced([row for row, _, _ in gate.ledger.rows()]) == priced(reserved)


def test_an_activation_that_is_paid_for_costs_no_row() -> None:
    rows = step_rows(policy("measured", gradients="noised"), RECORDS, [ref(2, 4)], trains=True)
    assert [(row.record, row.kind) for row in rows] == [
        (ref(2).key, "activations"),
        *((record.key, "gradients") for record in RECORDS),
    ]


def test_held_out_records_do_not_train() -> None:
    rows = step_rows(policy("measured", gradients="noised", dp_sgd=True), RECORDS, RECORDS, trains=False)
    assert {row.kind for row in rows} == {"activations of held-out records"}


@pytest.mark.parametrize(("bottom_trains", "parts"), [(False, 1), (True, 2)])
def test_a_step_of_dp_sgd_costs_each_record_a_row_for_each_part(bottom_trains: bool, parts: int) -> None:
    chosen = policy("measured", dp_sgd=True, dp_noise_multiplier=4.0, bottom_trains=bottom_trains)
    rows = rows_of(chosen, ReleaseKind.DP_SGD, RECORDS, [Leaving()], 0)
    assert sorted(row.record for row in rows) == sorted([record.key for record in RECORDS] * parts)
    assert [row.mu_squared for row in rows] == pytest.approx([(2 / 4) ** 2] * 3 * parts)


def test_all_records_of_a_client_may_change_a_step_of_dp_sgd_at_once() -> None:
    chosen = policy("measured", dp_sgd=True, dp_noise_multiplier=4.0, unit="client")
    (row,) = rows_of(chosen, ReleaseKind.DP_SGD, RECORDS, [Leaving()], 0)
    assert (row.record, row.mu_squared) == (EVERYTHING, pytest.approx((3 * 2 / 4) ** 2))


@pytest.mark.parametrize(("unit", "keys", "changes"), [("record", 3, MOST_LOSS / 3), ("client", 1, MOST_LOSS)])
def test_a_shared_loss_is_charged_for_what_its_unit_can_change(unit: str, keys: int, changes: float) -> None:
    rows = rows_of(
        policy("measured", unit=unit, metric_noise_multiplier=2.0), ReleaseKind.METRIC, RECORDS, [Leaving()], 0
    )
    assert len(rows) == keys
    assert {row.record for row in rows} == ({record.key for record in RECORDS} if keys == 3 else {EVERYTHING})
    assert [row.sensitivity for row in rows] == pytest.approx([changes] * keys)
    assert [row.mu_squared for row in rows] == pytest.approx([1 / 4] * keys)


@pytest.mark.parametrize("kind", ReleaseKind)
def test_in_mode_off_nothing_has_a_bound(kind: ReleaseKind) -> None:
    (row,) = rows_of(policy("off"), kind, [], [Leaving()], 0)
    assert (row.record, row.mu_squared) == (EVERYTHING, math.inf)


@pytest.mark.parametrize(("dp_sgd", "cost"), [(False, math.inf), (True, 0.0)])
def test_weights_have_no_bound_unless_dp_sgd_has_paid_for_them(dp_sgd: bool, cost: float) -> None:
    (row,) = rows_of(policy("measured", dp_sgd=dp_sgd), ReleaseKind.WEIGHTS, [], [Leaving()], 0)
    assert (row.record, row.mu_squared) == (EVERYTHING, cost)


TAINTED_WITHOUT_DP = {
    # kind: (the bottom is frozen, the bottom trains)
    ReleaseKind.ACTIVATION: (False, True),
    ReleaseKind.HELD_OUT_ACTIVATION: (False, True),
    ReleaseKind.GRADIENT: (True, True),
    ReleaseKind.WEIGHTS: (True, True),
    ReleaseKind.METRIC: (True, True),
}


@pytest.mark.parametrize("mode", ["off", "measured"])
@pytest.mark.parametrize("bottom_trains", FLAGS)
@pytest.mark.parametrize("kind", TAINTED_WITHOUT_DP)
def test_without_dp_whatever_sees_weights_that_train_is_tainted(
    kind: ReleaseKind, bottom_trains: bool, mode: str
) -> None:
    chosen = policy(mode, bottom_trains=bottom_trains)
    assert tainted(chosen, kind) == TAINTED_WITHOUT_DP[kind][bottom_trains]


@pytest.mark.parametrize("bottom_trains", FLAGS)
@pytest.mark.parametrize("kind", ReleaseKind)
def test_after_dp_sgd_nothing_is_tainted(kind: ReleaseKind, bottom_trains: bool) -> None:
    assert not tainted(policy("measured", dp_sgd=True, bottom_trains=bottom_trains), kind)


def test_taint_goes_into_every_row() -> None:
    plain, private = policy("measured", gradients="noised"), policy("measured", gradients="noised", dp_sgd=True)
    for chosen, expected in ((plain, True), (private, False)):
        rows = rows_of(chosen, ReleaseKind.GRADIENT, RECORDS, [Leaving()], 0)
        assert [row.tainted for row in rows] == [expected] * 3
