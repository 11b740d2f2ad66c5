"""The federation benchmark: its baselines are what they say, its bars judge all seeds, its table counts all bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.errors import ConfigError
from splitfl.federation.strategies import STRATEGIES
from splitfl.lab.bench import federation
from splitfl.lab.bench.federation import (
    ADAMW_CLIENTS,
    ALONE,
    BEFORE,
    CENTRAL,
    LOCAL,
    LONG_ROUNDS,
    PERSONAL,
    SETTINGS,
    SMALL_STEPS,
    TUNING_SEED,
    WAYS,
    bars,
    run,
    table,
)
from splitfl.lab.bench.harness import Result
from splitfl.lab.bench.hospitals import Hospitals, Scale, make_base
from splitfl.lab.bench.plots import draw_federation

QUICK = Scale(
    clients=3,
    notes=25,
    vocab=400,
    record_tokens=32,
    base_notes=40,
    base_specialty_notes=5,
    base_steps=10,
    rounds=2,
    local_steps=3,
    held_out_fraction=0.2,
)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    return Hospitals(make_base(folder, QUICK), folder, QUICK, "group", 1)


def test_every_strategy_is_measured_with_settings_that_a_federation_takes() -> None:
    assert set(SETTINGS) == {*STRATEGIES, ADAMW_CLIENTS, LONG_ROUNDS, PERSONAL}
    for name, tables in SETTINGS.items():
        merge = Scale().federation(0, tables).merge
        assert merge.strategy == {LONG_ROUNDS: "fedadam"}.get(name, name if name in STRATEGIES else "fedavg")
    assert TUNING_SEED not in range(3)


def test_training_together_beats_the_base_and_counts_what_it_sent(hospitals: Hospitals) -> None:
    before, merged = hospitals.untouched(), hospitals.federated(SETTINGS[ADAMW_CLIENTS])
    assert merged["union"][0] < before["union"][0]
    assert merged["own"] == merged["union"][0]
    kinds = {name: count for name, count in merged["bytes"].items() if name != "both ways"}
    assert set(kinds) == {"activations up", "gradients up", "weights up"}
    assert sum(kinds.values()) < merged["bytes"]["both ways"]


def test_personal_heads_give_every_client_a_model_and_send_no_weights(hospitals: Hospitals) -> None:
    found = hospitals.federated(SETTINGS[PERSONAL])
    assert len(set(found["union"])) == QUICK.clients
    assert "weights up" not in found["bytes"]


def test_alone_each_client_is_better_at_home_than_abroad(hospitals: Hospitals) -> None:
    found = hospitals.local_only()
    assert len(set(found["union"])) == QUICK.clients
    assert found["own"] < min(found["union"])
    assert found["bytes"] == {}


def test_one_client_that_has_everything_is_the_centralised_model(hospitals: Hospitals) -> None:
    alone = replace(hospitals, scale=replace(QUICK, clients=1), seed=2)
    found, central = alone.local_only(), alone.centralised()
    assert found["union"] == central["union"]
    assert central["bytes"]["both ways"] == sum(path.stat().st_size for path in alone.files.values())


def cells(seeds: int = 2, **union: float) -> list[dict[str, Any]]:
    """Made-up measurements: ``union`` are losses, the last of these ways' seeds is a tenth worse."""
    losses = {BEFORE: 3.0, CENTRAL: 2.0, PERSONAL: 2.6, ADAMW_CLIENTS: 2.2, LONG_ROUNDS: 2.3}
    losses |= {**dict.fromkeys(STRATEGIES, 2.1), **union}
    alone = {LOCAL: [2.8, 3.0], SMALL_STEPS: [2.7, 2.9]}
    return [
        {
            "partition": kind,
            "seed": seed,
            "model": way,
            "union": alone[way] if way in ALONE else [losses[way] * (1.1 if seed == seeds - 1 and way in union else 1)],
            "own": 2.0,
            "bytes": {"both ways": (10 + seed) * 10**6} if way in SETTINGS else {},
        }
        for kind in ("group", "dirichlet")
        for seed in reversed(range(seeds))
        for way in WAYS
    ]


def test_bars_judge_the_worst_seed_and_no_lucky_strategy() -> None:
    strategies, best_client, central = bars(cells(seeds=3, fedyogi=2.6, fedavg=2.5, fedadam=2.03))[:3]
    assert strategies.name.startswith("group: fedyogi")
    assert strategies.value == pytest.approx(2.6 * 1.1 / 2.8)
    assert not strategies.holds
    assert best_client.value == pytest.approx(2.5 * 1.1 / 2.7)
    assert central.name.startswith("group: fedadam")
    assert central.value == pytest.approx(2.03 / 2.0)
    assert central.holds


def test_table_has_a_row_for_every_way_and_each_client_alone() -> None:
    rows = table(cells(fedavg=2.0))
    assert len(rows) == 2 * (len(WAYS) + 4)
    by_name = {row["model"]: row for row in rows if row["partition"] == "group"}
    assert by_name["fedavg"]["union"] == {"min": 2.0, "median": pytest.approx(2.1), "max": pytest.approx(2.2)}
    assert by_name["fedavg"]["MB both ways"] == 10.5
    assert by_name["local-only, client 1"]["union"]["median"] == 3.0
    assert by_name[SMALL_STEPS]["union"]["median"] == pytest.approx(2.8)


def test_picture_shows_every_strategy(tmp_path: Path) -> None:
    draw_federation(Result("federation", {}, table(cells())), tmp_path / "federation.png")
    assert (tmp_path / "federation.png").stat().st_size > 10_000


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "WAYS", (BEFORE, *ALONE, *STRATEGIES, CENTRAL))
    trained: list[str] = []

    def trains(*_: Any) -> dict[str, Any]:
        trained.append("")
        if len(trained) == 5:
            raise KeyboardInterrupt
        return {"union": [2.0], "own": 2.0, "bytes": {}}

    for way in ("untouched", "local_only", "federated", "centralised"):
        monkeypatch.setattr(Hospitals, way, trains)
    monkeypatch.setattr(federation, "make_base", lambda folder, _: folder)
    monkeypatch.setattr(Hospitals, "inputs", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run(scale=QUICK, seeds=1, work=tmp_path)
    run(scale=QUICK, seeds=1, work=tmp_path)
    assert len(trained) == 1 + 2 * (len(STRATEGIES) + 4)
    with pytest.raises(ConfigError, match="holds another run"):
        run(scale=QUICK, seeds=2, work=tmp_path)


def test_command_writes_table_and_picture_and_says_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*, seeds: int, **_: Any) -> Result:
        made_up = cells(seeds, fedavg=2.5)
        return Result("federation", {}, table(made_up), bars(made_up))

    monkeypatch.setattr(federation, "run", measured)
    ended = CliRunner().invoke(app, ["bench", "federation", "--seeds", "2", "--out", str(tmp_path)])
    assert ended.exit_code == 0
    assert "FAILS: group: fedavg / best local-only client 1.019 <= 1" in ended.stdout
    assert "model=local-only, client 1  union=3/3/3" in ended.stdout
    assert len(json.loads((tmp_path / "federation.json").read_text())["bars"]) == 6
    assert (tmp_path / "federation.png").exists()


def test_no_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 seeds"):
        run(scale=QUICK, seeds=0)
