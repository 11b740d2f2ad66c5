"""Baselines beside the federated result: they cost nothing, change nothing, and the report says when they win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_model.baselines import Baselines, spread, wanted
from client_model.telling import beside, not_earned
from splitfl.config import Federation, Merge, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.lab.federation import FederationResult, run_federation
from splitfl.split.create import create_checkpoint

CUT = Cut(1, 1)


def settings(baselines: str, **privacy: Any) -> Federation:
    tables: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 3},
        "batch": {"records": 4, "max_length": 32},
        "evaluation": {"records": 4, "baselines": baselines},
        "privacy": {"mode": "measured", "clip_norm": 1.0} | privacy,
    }
    return parse_federation(tables, "the test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    create_checkpoint(
        folder, family="llama", layers=3, hidden=64, vocab=320, corpus=generate_notes("general", 60, 7), seed=0
    )
    return folder


def run(model: Path, folder: Path, chosen: Federation) -> FederationResult:
    folder.mkdir()
    write_notes(folder / "a.jsonl", "cardiology", 30, 1)
    return run_federation(model, {"a": folder / "a.jsonl"}, chosen, folder / "run", noise_seed=3)


def test_baselines_release_nothing_and_leave_the_federation_as_it_is(model: Path, tmp_path: Path) -> None:
    without = run(model, tmp_path / "without", settings("none"))
    beside_it = run(model, tmp_path / "with", settings("all"))
    assert without.reports["a"]["baselines"] is None
    found = beside_it.reports["a"]["baselines"]
    assert found["federated"] == beside_it.held_out_losses("a")[-1][1]
    assert 0 < found["ends_only"] != found["federated"]
    # one client, no gradient: top-only is the federation without its merge of one, so the same
    assert found["top_only"] == pytest.approx(found["federated"], rel=1e-5)
    told = [event.facts for event in beside_it.events if event.event == "baseline_step"]
    assert [(facts["which"], facts["step"], facts["steps"]) for facts in told] == [
        (which, step, 6) for which in ("ends-only", "top-only") for step in range(1, 7)
    ]
    assert told[-1]["bytes_received"] > told[5]["bytes_received"] == told[0]["bytes_received"]  # only top-only fetches
    left = [result.reports["a"]["privacy"]["left"] for result in (without, beside_it)]
    assert left[0] == left[1]
    one, other = without.weights(), beside_it.weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_baselines_train_as_many_steps_as_the_client_did(model: Path, tmp_path: Path) -> None:
    chosen = settings("all", clip_norm=1.0)
    chosen = chosen.model_copy(update={"rounds": chosen.rounds.model_copy(update={"count": 3, "client_fraction": 0.5})})
    data = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    for name, path in data.items():
        write_notes(path, "cardiology", 30, ord(name))
    result = run_federation(model, data, chosen, tmp_path / "run", noise_seed=3)
    taken = {name: result.reports[name]["rounds_taken"] for name in "ab"}
    assert sorted(taken.values()) in ([0, 3], [1, 2])
    for name, rounds in taken.items():
        told = [event.facts for event in result.events if (event.client, event.event) == (name, "baseline_step")]
        assert [facts["step"] for facts in told] == [*range(1, 3 * rounds + 1)] * 2
        assert {facts["steps"] for facts in told} <= {3 * rounds}
        assert result.reports[name]["baselines"]["steps"] == 3 * rounds


def test_baselines_move_as_the_trunk_does_whatever_the_clients_optimizer(model: Path, tmp_path: Path) -> None:
    common = settings("ends")
    own = {"client_name": "sgd", "client_learning_rate": 1e-9}
    slow = common.model_copy(update={"optimizer": common.optimizer.model_copy(update=own)})
    drifting = slow.model_copy(update={"merge": Merge(strategy="scaffold")})  # which AdamW's steps would not go with
    chosen = {"common": common, "slow": slow, "drifting": drifting}
    found = {name: run(model, tmp_path / name, each).reports["a"]["baselines"] for name, each in chosen.items()}
    assert len({baselines["ends_only"] for baselines in found.values()}) == 1
    assert found["common"]["federated"] != found["slow"]["federated"]


@given(count=st.integers(1, 60), taken=st.integers(0, 60))
def test_rounds_are_spread_over_the_schedule(count: int, taken: int) -> None:
    chosen = spread(min(taken, count), count)
    assert len(set(chosen)) == min(taken, count)
    assert chosen == sorted(chosen)
    assert all(0 <= round_ < count for round_ in chosen)
    assert chosen[:1] in ([], [0])
    assert spread(count, count) == list(range(count))


def test_top_only_is_not_measured_where_the_trunk_has_moved(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "run", settings("all", gradients="noised")).reports["a"]["baselines"]
    assert found["top_only"] is None
    assert found["ends_only"] is not None


def test_auto_means_all_with_privacy_on_and_none_else() -> None:
    assert wanted(settings("auto"), CUT) == (True, True)
    assert wanted(settings("auto", gradients="noised"), CUT) == (True, False)
    assert wanted(settings("ends"), CUT) == (True, False)
    assert wanted(Federation(), CUT) == (False, False)


@pytest.mark.parametrize(("ends_only", "top_only", "earned"), [(3.0, 3.1, True), (3.0, 1.9, False), (1.9, None, False)])
def test_report_says_first_when_the_split_did_not_pay(ends_only: float, top_only: float | None, earned: bool) -> None:
    found = Baselines(2.0, ends_only, top_only, 6)
    assert found.earned == earned
    report = {"federated": 2.0, "ends_only": ends_only, "top_only": top_only, "earned": found.earned, "steps": 6}
    assert [line.startswith("Splitting did NOT pay") for line in not_earned(report)] == [True] * (not earned)
    assert "federated 2.000, ends-only" in beside(report)[0]
    assert "with this client's 6 steps" in beside(report)[0]
