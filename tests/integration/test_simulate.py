"""Simulations: clients that take turns train the very model that clients which stay would, interrupted or not."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

from client_model.participant import Participant
from server_model.store import Store
from splitfl.cli import app
from splitfl.config import parse_section
from splitfl.errors import ConfigError, DataError
from splitfl.federation.strategies import STRATEGIES, FedAvg
from splitfl.lab.federation import FederationEvent, client_folder, run_federation, server_folder
from splitfl.lab.simulate.history import History
from splitfl.lab.simulate.plots import draw_curves
from splitfl.lab.simulate.results import summary, write_results
from splitfl.lab.simulate.run import SimulationResult, simulate
from splitfl.lab.simulate.settings import Simulation, load_simulation
from splitfl.privacy.accounting import mu_for
from splitfl.privacy.budget import ROUNDING
from splitfl.privacy.ledger import Ledger

pytestmark = pytest.mark.usefixtures("no_thread_stays_behind")

SETTINGS = """
[model]
layers = 3
hidden = 64
vocab = 300

[data]
rows = 8

[partition]
clients = 6
alpha = 0.1

[federation.rounds]
count = 3
local_steps = 2
client_fraction = 0.34

[federation.batch]
records = 2
max_length = 24

[federation.optimizer]
learning_rate = 3e-3

[federation.evaluation]
held_out_fraction = 0.3
records = 4
"""


def settings(**tables: Any) -> Simulation:
    """The settings above, with these tables instead."""
    return parse_section(Simulation, {**tomllib.loads(SETTINGS), **tables}, "the test", "the page")


def weights(out: Path) -> dict[str, Tensor]:
    store = Store(server_folder(out))
    last = store.load(store.durable_rounds()[-1])
    return {**last.trunk, **last.merged}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SimulationResult:
    done = simulate(settings(), tmp_path_factory.mktemp("simulation") / "out")
    write_results(done)
    return done


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_clients_that_take_turns_train_the_model_of_clients_that_stay(result: SimulationResult, tmp_path: Path) -> None:
    simulation, inputs = result.simulation, result.folder / "input"
    data = {name: inputs / f"{name}.jsonl" for name in simulation.partition.names}
    stayed = run_federation(inputs / "model", data, simulation.federation, tmp_path / "stayed")
    assert_same_weights(result.folder, stayed.folder)
    for name in data:
        assert result.reports[name]["held_out_losses"][-1] == stayed.reports[name]["held_out_losses"][-1]
        assert result.reports[name]["rounds_taken"] == stayed.reports[name]["rounds_taken"]
        sent, least = (reports[name]["bytes"]["bytes_sent"] for reports in (result.reports, stayed.reports))
        assert least <= sent < 1.02 * least  # each turn asks for the list of assets anew


def test_turns_keep_what_a_strategy_keeps_at_its_clients(tmp_path: Path) -> None:
    federation = tomllib.loads(SETTINGS)["federation"]
    federation |= {"merge": {"strategy": "scaffold"}, "optimizer": {"name": "sgd", "schedule": "constant"}}
    simulation, out = settings(federation=federation), tmp_path / "out"
    simulate(simulation, out)
    data = {name: out / "input" / f"{name}.jsonl" for name in simulation.partition.names}
    run_federation(out / "input" / "model", data, simulation.federation, tmp_path / "stayed")
    assert_same_weights(out, tmp_path / "stayed")


def test_no_more_clients_are_in_memory_than_a_cohort_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = [0], [0], threading.Lock()
    run = Participant.run

    def counted(self: Participant, *args: Any) -> dict[str, Any]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return run(self, *args)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(Participant, "run", counted)
    simulate(settings(), tmp_path / "out")
    assert most[0] == 3  # ceil(0.34 x 6)


def test_results_are_the_same_figures_in_every_file(result: SimulationResult) -> None:
    everything = json.loads((result.folder / "results.json").read_text())
    with (result.folder / "rounds.csv").open() as file:
        rounds = list(csv.DictReader(file))
    with (result.folder / "clients.csv").open() as file:
        clients = list(csv.DictReader(file))
    assert [row["round"] for row in rounds] == ["0", "1", "2", "3"]
    assert [int(row["clients"]) for row in rounds] == [0, 3, 3, 3]
    assert [float(row["held_out_loss"]) for row in rounds] == [row["held_out_loss"] for row in everything["rounds"]]
    assert float(rounds[-1]["held_out_loss"]) < float(rounds[0]["held_out_loss"]) - 0.05
    assert int(rounds[-1]["held_out_clients"]) == 6
    assert sum(int(row["rows"]) for row in clients) == 24
    assert sum(int(row["rounds_taken"]) for row in clients) == 9
    assert sum(int(row["bytes_sent"]) for row in clients) == everything["bytes"]["sent"]
    in_rounds = sum(row["bytes_sent"] for row in everything["rounds"])
    assert (
        0.7 * everything["bytes"]["sent"] < in_rounds < everything["bytes"]["sent"]
    )  # the last measurement is in none
    assert everything["settings"]["partition"]["alpha"] == 0.1
    assert summary(result).keys() == everything.keys() - {"settings", "clients"}


def test_table_of_clients_has_the_first_round_measured_and_the_baselines(tmp_path: Path) -> None:
    federation = tomllib.loads(SETTINGS)["federation"]
    federation["rounds"]["count"], federation["evaluation"]["baselines"] = 2, "ends"
    done = simulate(settings(federation=federation), tmp_path / "out")
    write_results(done)
    found = {row["client"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["clients"]}
    with (tmp_path / "out" / "clients.csv").open() as file:
        for row in csv.DictReader(file):
            client, cohorts = found[row["client"]], done.history.cohorts
            first = next((number for number, cohort in cohorts.items() if row["client"] in cohort), 2)
            assert int(row["first_held_out_round"]) == client["first_held_out_round"] == first
            assert float(row["ends_only"]) == client["baselines"]["ends_only"]
            assert row["top_only"] == ""
            assert int(row["baseline_steps"]) == client["baselines"]["steps"] == 2 * int(row["rounds_taken"])


def test_results_folder_holds_the_model_and_no_cache(result: SimulationResult) -> None:
    assert result.exported is not None
    assert (result.exported / "model.safetensors").exists()
    assert not (result.folder / ".cache").exists()


def test_personal_heads_are_exported_by_client_alone(tmp_path: Path) -> None:
    federation = {**tomllib.loads(SETTINGS)["federation"], "merge": {"share": "none"}}
    done = simulate(settings(federation=federation), tmp_path / "out")
    assert done.exported is None
    assert (tmp_path / "out" / "clients" / "client-0000" / "merged.safetensors").exists()


def test_cuts_are_dealt_in_turn(tmp_path: Path) -> None:
    federation = tomllib.loads(SETTINGS)["federation"]
    federation["model"] = {"min_bottom": 0, "max_top": 2, "freeze_below": 0}
    done = simulate(settings(cuts=["1,1", "0,2"], federation=federation), tmp_path / "out")
    assert [report["cut"] for _, report in sorted(done.reports.items())] == ["1,1", "0,2"] * 3


def test_rows_of_a_file_are_dealt_by_its_column(tmp_path: Path) -> None:
    rows = [{"text": f"note {number} of the ward", "ward": "ab"[number % 2], "id": number} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toml = SETTINGS.replace("rows = 8", 'path = "rows.jsonl"\ngroup = "ward"').replace("alpha = 0.1", 'kind = "group"')
    (tmp_path / "simulation.toml").write_text(toml.replace("count = 3", "count = 1"))
    done = simulate(load_simulation(tmp_path / "simulation.toml"), tmp_path / "out")
    assert [len(groups) for groups in done.groups.values()] == [1] * 6
    dealt = [json.loads(line) for path in (tmp_path / "out" / "input").glob("client-*.jsonl") for line in path.open()]
    assert sorted(row["text"] for row in dealt) == sorted(str(row["text"]) for row in rows)


def test_example_of_the_page_simulates_a_strategy_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulating.md").read_text()
    monkeypatch.setitem(STRATEGIES, "partway", FedAvg)  # so that what the page adds goes again
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    found = json.loads((tmp_path / "partway" / "results.json").read_text())
    assert found["settings"]["federation"]["merge"]["server_momentum"] == 0.5
    assert found["rounds"][2]["held_out_loss"] < found["rounds"][0]["held_out_loss"]
    assert (tmp_path / "partway" / "curves.png").exists()


# -- privacy -----------------------------------------------------------------------------------------------------------

PRIVACY = {
    "measured": {"mode": "measured", "gradients": "noised"},
    "certified": {"mode": "certified", "epsilon": 8.0, "gradients": "noised", "dp_sgd": True},
}


def private(mode: str) -> Simulation:
    """Two clients with noise; the second round's cohort is another draw."""
    federation = {**tomllib.loads(SETTINGS)["federation"], "privacy": {**PRIVACY[mode], "clip_norm": 5.0}}
    federation["rounds"] = {"count": 2, "local_steps": 2, "client_fraction": 0.5}
    return settings(federation=federation, partition={"clients": 2})


def said(report: Any) -> dict[str, Any]:
    """The privacy section without what hangs on noise that is never the same twice."""
    return {key: value for key, value in report["privacy"].items() if key != "ledger"}


@pytest.mark.parametrize("mode", PRIVACY)
def test_private_simulation_charges_ledgers_and_says_what_a_joined_run_says(mode: str, tmp_path: Path) -> None:
    simulation, out = private(mode), tmp_path / "out"
    done = simulate(simulation, out)
    write_results(done)
    data = {name: out / "input" / f"{name}.jsonl" for name in simulation.partition.names}
    stayed = run_federation(out / "input" / "model", data, simulation.federation, tmp_path / "stayed")
    for row in json.loads((out / "results.json").read_text())["clients"]:
        name = row["client"]
        assert row["privacy"] == done.reports[name]["privacy"]
        assert said(row) == said(stayed.reports[name])
        ledger = Ledger(client_folder(out, name) / "ledger.sqlite")
        assert (row["privacy"]["mode"], row["privacy"]["ledger"]["rows"]) == (mode, ledger.count)
        assert row["privacy"]["ledger"]["head"] == ledger.head.hex()
        ledger.close()
    statements = [row["privacy"]["statement"] for row in json.loads((out / "results.json").read_text())["clients"]]
    assert all(text.startswith({"measured": "No guarantee", "certified": "epsilon = 8"}[mode]) for text in statements)


def test_private_simulation_that_goes_on_releases_no_record_twice_and_keeps_its_budget(tmp_path: Path) -> None:
    def fail(told: FederationEvent, _history: History) -> None:
        if told.client and told.event == "step" and told.facts["round"] == 1:
            raise ZeroDivisionError("as planned")

    simulation = private("certified")
    with pytest.raises(ZeroDivisionError, match="as planned"):
        simulate(simulation, tmp_path / "out", report=fail)
    done = simulate(simulation, tmp_path / "out", resume=True)
    for name, report in done.reports.items():
        ledger = Ledger(client_folder(tmp_path / "out", name) / "ledger.sqlite")
        once = [row.record for row, _, _ in ledger.rows() if row.kind.startswith("activations")]
        bound = mu_for(8.0, 1e-5) ** 2 * ROUNDING
        assert once
        assert len(set(once)) == len(once)
        assert all(spent <= bound for spent in ledger.spent.values())
        assert report["privacy"]["epsilon"] == 8.0
        ledger.close()


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "event", "round_"), [(True, "step", 1), (False, "round_durable", 0)])
def test_interrupted_simulation_ends_with_the_weights_of_an_undisturbed_one(
    client: bool, event: str, round_: int, result: SimulationResult, tmp_path: Path
) -> None:
    def fail(told: FederationEvent, _history: History) -> None:
        if (bool(told.client), told.event, told.facts.get("round")) == (client, event, round_):
            raise ZeroDivisionError("as planned")

    with pytest.raises(ZeroDivisionError, match="as planned"):
        simulate(settings(), tmp_path / "out", report=fail)
    done = simulate(settings(), tmp_path / "out", resume=True)
    assert_same_weights(tmp_path / "out", result.folder)
    assert done.history.cohorts == result.history.cohorts
    assert done.history.losses == result.history.losses
    assert done.history.held_out == result.history.held_out


def test_killed_process_goes_on_and_ends_with_the_same_weights(result: SimulationResult, tmp_path: Path) -> None:
    (tmp_path / "simulation.toml").write_text(SETTINGS)
    command = [sys.executable, "-m", "splitfl.cli", "simulate", str(tmp_path / "simulation.toml")]
    command += ["--out", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    events, deadline = tmp_path / "out" / "events.jsonl", time.monotonic() + 120
    while not (events.exists() and '"step", "round": 1' in events.read_text()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = simulate(settings(), tmp_path / "out", resume=True)
    assert_same_weights(tmp_path / "out", result.folder)
    assert done.history.losses == result.history.losses


def test_command_prints_one_object_and_leaves_a_picture(tmp_path: Path) -> None:
    (tmp_path / "simulation.toml").write_text(SETTINGS.replace("count = 3", "count = 1"))
    command = ["simulate", f"{tmp_path}/simulation.toml", "--out", f"{tmp_path}/out", "--json"]
    printed = json.loads(CliRunner().invoke(app, command).stdout)
    assert [row["clients"] for row in printed["rounds"]] == [0, 3]
    assert printed["clients_held_out_loss"]["best"] <= printed["clients_held_out_loss"]["worst"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_simulation_says_so_and_prints_its_results_again(result: SimulationResult, tmp_path: Path) -> None:
    (tmp_path / "simulation.toml").write_text(SETTINGS)
    command = ["simulate", f"{tmp_path}/simulation.toml", "--out", str(result.folder)]
    files = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    for words in (command, [*command, "--resume"]):
        again = CliRunner().invoke(app, words)
        assert again.exit_code == 0
        assert "is finished" in again.stderr
        assert "6 clients, 3 rounds" in again.stdout
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout) == summary(result) | {
        "peak_rss": json.loads((result.folder / "results.json").read_text())["peak_rss"]
    }
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == files
    (tmp_path / "simulation.toml").write_text(SETTINGS.replace("alpha = 0.1", "alpha = 0.2"))
    other = CliRunner().invoke(app, command)
    assert (other.exit_code, other.stdout) == (ConfigError.exit_code, "")
    assert "are not those" in other.stderr


@pytest.mark.parametrize("drawn", ["each round other clients", ""])
def test_picture_joins_no_cohorts_by_a_line(drawn: str) -> None:
    table = [
        {"round": done, "training_loss": 2.0, "held_out_loss": 3.0 - done, "held_out_clients": held}
        for done, held in enumerate([2, 2, 6] if drawn else [6, 6, 6])
    ]
    panel = Figure().subplots()
    draw_curves(table, panel)
    assert panel.get_title().removeprefix("Loss by round").lstrip(": ") == drawn
    lines = {str(line.get_label()): line for line in panel.get_lines()}
    assert ("held out, only the next round's clients" in lines) == bool(drawn)
    joined = {label for label, line in lines.items() if line.get_linestyle() != "None"}
    assert joined == {"held out, all clients"} | (set() if drawn else {"training, the round's clients"})
    assert len(lines["held out, all clients"].get_xdata()) == (1 if drawn else 3)


def test_finished_simulation_may_be_resumed_and_stays_as_it_is(result: SimulationResult) -> None:
    before = weights(result.folder)
    again = simulate(settings(), result.folder, resume=True)
    assert again.history.held_out == result.history.held_out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(result.folder).items())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_folder_in_use_is_refused_and_left_alone(result: SimulationResult, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is in use"):
        simulate(settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="holds a simulation") as refused:
        simulate(settings(), result.folder)
    assert "--resume" in refused.value.remedy
    with pytest.raises(ConfigError, match="are not those"):
        simulate(settings(partition={"clients": 5}), result.folder, resume=True)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"federation": {"merge": {"strategy": "fedsgd"}}}, "'fedsgd' does not exist"),
        ({"federation": {"merge": {"aggregate": "krum"}}}, "needs 5 updates"),
        ({"federation": {"merge": {"proximal_mu": 0.1}}}, "proximal_mu is set"),
        ({"model": {"layers": 1}}, "cut 1,1 keeps 2 blocks"),
        (
            {"cuts": ["1,1", "0,3"], "federation": {"model": {"min_bottom": 0, "max_top": 3}}, "model": {"layers": 2}},
            "max_top = 3 is above the model's 2 blocks",
        ),
        (
            {"cuts": ["1,1", "1,2"], "federation": {"model": {"max_top": 2}}, "model": {"layers": 2}},
            "cut 1,2 keeps 3 blocks",
        ),
        ({"model": {"family": "gpt5"}}, "unknown model family 'gpt5'"),
        ({"model": {"hidden": 7}}, "hidden size 7"),
        ({"partition": {"clients": 20}}, "24 rows are too few for 20 clients with at least 2 each"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    tables: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        simulate(settings(**tables), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_without_their_group_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n')
    source = {"path": tmp_path / "rows.jsonl", "group": "ward"}
    with pytest.raises(DataError, match="does not say its 'ward'"):
        simulate(settings(data=source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
