"""The report says what the ledger holds, and no more than that allows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from gates import policy

from splitfl.privacy.accounting import epsilon_of, mean_bits, mu_for
from splitfl.privacy.ledger import EVERYTHING, Ledger, ReleaseKind, Row
from splitfl.privacy.report import OFF, SEVERAL, privacy_report

A, B = b"a", b"b"


def row(kind: ReleaseKind, record: bytes = A, mu: float = 0.5, *, tainted: bool = False) -> Row:
    return Row(record, kind.value, mu, 1.0, 0, tainted, bytes(32), 10)


def ledger(folder: Path, *rows: Row) -> Ledger:
    opened = Ledger(folder / "ledger.sqlite")
    opened.append(rows)
    return opened


def weights(*, paid: bool) -> Row:
    return Row(EVERYTHING, "weights", 0.0 if paid else 1.0, 0.0, 0, not paid, bytes(32), 10)


def test_epsilon_is_of_the_unit_that_spent_most(tmp_path: Path) -> None:
    spent = ledger(tmp_path, row(ReleaseKind.ACTIVATION, A), row(ReleaseKind.ACTIVATION, B), row(ReleaseKind.METRIC, B))
    found = privacy_report(policy("measured", dp_sgd=True), spent)
    assert found["epsilon"] == pytest.approx(epsilon_of(math.sqrt(0.5), 1e-5))
    assert found["epsilon_activations"] == pytest.approx(epsilon_of(0.5, 1e-5))
    assert found["most_spent"] == pytest.approx(0.5)
    whole = privacy_report(policy("measured", dp_sgd=True, unit="client"), spent)
    assert whole["epsilon"] == pytest.approx(epsilon_of(math.sqrt(0.75), 1e-5))


def test_with_a_target_it_is_the_target_whatever_is_spent(tmp_path: Path) -> None:
    found = privacy_report(policy("certified"), ledger(tmp_path, row(ReleaseKind.ACTIVATION)))
    assert found["epsilon"] == 8.0
    assert found["mean_bits"] == pytest.approx(mean_bits(mu_for(8.0, 1e-5)))


def test_what_left_under_a_weaker_target_counts_under_a_stronger_one(tmp_path: Path) -> None:
    earlier = mu_for(8.0, 1e-5)
    found = privacy_report(policy("certified", epsilon=1.0), ledger(tmp_path, row(ReleaseKind.ACTIVATION, mu=earlier)))
    assert found["epsilon"] == pytest.approx(8.0)
    assert found["mean_bits"] == pytest.approx(mean_bits(earlier))
    assert found["statement"].startswith("epsilon = 8 ")
    assert "More than the target of 1" in found["statement"]


def test_target_that_is_spent_to_its_end_is_not_exceeded(tmp_path: Path) -> None:
    rows = [row(ReleaseKind.ACTIVATION, mu=mu_for(8.0, 1e-5) / math.sqrt(7)) for _ in range(7)]
    found = privacy_report(policy("certified"), ledger(tmp_path, *rows))
    assert found["epsilon"] == 8.0
    assert "More than" not in found["statement"]


@pytest.mark.parametrize("bad", [row(ReleaseKind.GRADIENT, tainted=True), weights(paid=False)])
def test_a_tainted_or_unbounded_row_leaves_activations_alone_with_an_epsilon(bad: Row, tmp_path: Path) -> None:
    found = privacy_report(policy("measured"), ledger(tmp_path, row(ReleaseKind.ACTIVATION), bad))
    assert (found["epsilon"], found["mean_bits"], found["guess_bound"]) == (None, None, None)
    assert found["epsilon_activations"] == pytest.approx(epsilon_of(0.5, 1e-5))
    assert found["statement"].endswith("whole transcript: none (no bound).")
    assert "no bound for the rest" in found["several_records"]


def test_activations_of_a_bottom_that_trained_without_dp_have_none_either(tmp_path: Path) -> None:
    found = privacy_report(policy("measured"), ledger(tmp_path, row(ReleaseKind.ACTIVATION, tainted=True)))
    assert (found["epsilon"], found["epsilon_activations"]) == (None, None)


@pytest.mark.parametrize(
    ("beside", "factor"), [(ReleaseKind.GRADIENT, math.sqrt(SEVERAL)), (ReleaseKind.DP_SGD, SEVERAL)]
)
def test_several_records_of_one_person_are_said_with_an_epsilon(
    beside: ReleaseKind, factor: float, tmp_path: Path
) -> None:
    found = privacy_report(
        policy("measured", dp_sgd=True), ledger(tmp_path, row(ReleaseKind.ACTIVATION, mu=0.3), row(beside, mu=0.4))
    )
    assert f"with {SEVERAL}: epsilon = {epsilon_of(0.5 * factor, 1e-5):.4g} at most" in found["several_records"]


def test_of_a_whole_client_all_records_are_the_unit(tmp_path: Path) -> None:
    found = privacy_report(policy("measured", unit="client"), ledger(tmp_path, row(ReleaseKind.ACTIVATION)))
    assert "together are the unit" in found["several_records"]


def test_simulated_noise_gives_no_epsilon(tmp_path: Path) -> None:
    found = privacy_report(policy("certified"), ledger(tmp_path, row(ReleaseKind.ACTIVATION)), simulated=True)
    assert (found["epsilon"], found["epsilon_activations"]) == (None, None)
    assert found["statement"].startswith("Simulated")


def test_mode_off_says_that_the_server_can_read(tmp_path: Path) -> None:
    found = privacy_report(policy("off"), ledger(tmp_path))
    assert (found["statement"], found["epsilon"]) == (OFF, None)
    assert "losses" in found["stayed"]
    assert "several_records" not in found


def test_a_loss_that_was_shared_is_not_said_to_have_stayed(tmp_path: Path) -> None:
    assert "losses" not in privacy_report(policy("measured"), ledger(tmp_path, row(ReleaseKind.METRIC)))["stayed"]


@pytest.mark.parametrize(
    ("paid", "protection"), [(True, "epsilon of the whole transcript"), (False, "nothing but averaging")]
)
def test_who_gets_merged_weights_is_said_to_be_held_off_by_what_there_is(
    paid: bool, protection: str, tmp_path: Path
) -> None:
    found = privacy_report(policy("measured", dp_sgd=paid), ledger(tmp_path, weights(paid=paid)))
    others = {party["party"]: party["protection"] for party in found["parties"]}["other clients"]
    assert others.startswith(protection)
