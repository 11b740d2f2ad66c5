"""Corrections at the client: what they add, what they keep from round to round, and nothing to other weights."""

from __future__ import annotations

import torch

from splitfl.federation.drift import ControlVariates, Proximal

START = {"w": torch.tensor([1.0, 2.0])}


def test_proximal_term_pulls_towards_the_start_of_this_round() -> None:
    correction = Proximal(0.5)
    correction.begin({"w": torch.zeros(2)}, {})
    correction.begin(START, {})
    term = correction("w", torch.tensor([3.0, 2.0]))
    assert term is not None
    assert term.tolist() == [1.0, 0.0]
    correction.end({"w": torch.zeros(2)}, 1.0)
    assert correction.kept == {}


def test_weight_without_a_start_is_left_alone() -> None:
    for correction in (Proximal(0.5), ControlVariates()):
        assert correction("w", torch.ones(2)) is None
        correction.begin(START, {})
        assert correction("personal", torch.ones(2)) is None


def test_control_variates_start_at_zero_and_follow_option_two() -> None:
    correction = ControlVariates()
    correction.begin(START, {})
    assert torch.equal(correction("w", START["w"]), torch.zeros(2))  # type: ignore[arg-type]
    correction.end({"w": torch.tensor([0.0, 3.0])}, 0.5)
    assert correction.kept["w/own"].tolist() == [2.0, -2.0]  # 0 - 0 + (x - y) / 0.5
    correction.begin(START, {"w/control": torch.tensor([1.0, 1.0]), "other/control": torch.ones(1)})
    assert correction("w", START["w"]).tolist() == [-1.0, 3.0]  # type: ignore[union-attr]
    correction.end({"w": torch.tensor([1.0, 1.0])}, 0.5)
    assert correction.kept["w/own"].tolist() == [1.0, -1.0]  # 2 - 1 + 0, -2 - 1 + 2


def test_only_a_clients_own_variate_outlives_the_round() -> None:
    correction = ControlVariates()
    correction.begin(START, {})
    assert {name.partition("/")[2] for name in correction.kept} == {"own", "control", "start"}
    correction.end(START, 1.0)
    assert correction.kept.keys() == {"w/own"}
