"""What a simulation is told and what it remembers: settings refused by name, a log that a kill cut short."""

from __future__ import annotations

import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.config import Federation, parse_section
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.lab.federation import FederationEvent
from splitfl.lab.simulate.history import EventLog, History
from splitfl.lab.simulate.settings import Simulation, load_simulation
from splitfl.lab.simulate.view import RoundBar

PAGE = Path(__file__).parents[3] / "docs" / "simulating.md"


def settings(**tables: Any) -> Simulation:
    return parse_section(Simulation, {"partition": {"clients": 6}, **tables}, "the test", "the page")


def test_half_written_event_is_cut_off(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write(FederationEvent("", "round_open", {"round": 0, "cohort": ["a"]}))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"client": "a", "eve')
    again = EventLog(tmp_path / "events.jsonl")
    again.write(FederationEvent("a", "step", {"round": 0, "step": 0, "loss": 2.0}))
    history = EventLog(tmp_path / "events.jsonl").history
    assert history.cohorts == {0: ["a"]}
    assert history.training_loss(0) == 2.0


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"nonsense": {}}, "nonsense: Extra inputs"),
        ({"partition": {"kind": "odd"}}, "partition.kind"),
        ({"partition": {"alpha": 0}}, "partition.alpha"),
        ({"partition": {"clients": True}}, "partition.clients: Input should be a valid integer"),
        ({"partition": {"clients": "20"}}, "partition.clients: Input should be a valid integer"),
        ({"model": {"corpus": [1]}}, "model.corpus.0"),
        ({"partition": {"clients": 2000}}, "partition.clients"),
        ({"federation": {"rounds": {"counts": 1}}}, "federation.rounds.counts: Extra inputs"),
        ({"federation": {"rounds": {"min_clients": 9}}}, "min_clients = 9, but partition.clients = 6"),
        ({"data": {"path": "a.jsonl"}}, "set data.group"),
        ({"data": {"path": "a.jsonl", "rows": 4}}, "leave out specialties, rows and seed"),
        ({"data": {"group": "ward"}}, "the group of a note is its specialty"),
        ({"data": {"specialties": ["cardiology", "astrology"]}}, "specialties are, once each, some of general"),
        ({"model": {"folder": "base", "layers": 4}}, "leave out the other fields"),
        (
            {"federation": {"release": {"rank": 4}, "privacy": {"mode": "measured"}}},
            "release.rank needs a model.folder",
        ),
        ({"cuts": ["1,2"]}, "cuts: 1,2 is outside"),
        ({"cuts": ["1"]}, "is not two numbers"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(**tables)


def test_file_that_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\npath = "rows.jsonl"\ngroup = "ward"\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl does not exist"):
        load_simulation(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_simulation(tmp_path / "b.toml")


def test_cut_of_a_client_comes_round() -> None:
    assert settings().cut_of(3) is None
    assert Cut.parse("1,1") == settings(cuts=["1,1"]).cut_of(3)


def test_example_of_the_documentation_is_a_simulation() -> None:
    example = PAGE.read_text().partition("```toml\n")[2].partition("```")[0]
    simulation = parse_section(Simulation, tomllib.loads(example), "the page", "the page")
    assert (simulation.partition.clients, simulation.federation.rounds.client_fraction) == (100, 0.1)


@pytest.mark.parametrize(
    ("table", "code", "says"),
    [
        ("[partition]\nclient = 3", ConfigError.exit_code, "partition.client: Extra inputs"),
        ('[data]\npath = "none.jsonl"\ngroup = "ward"', ConfigError.exit_code, "none.jsonl does not exist"),
        ("[data]\nrows = 2\n[partition]\nclients = 9", ConfigError.exit_code, "6 rows are too few for 9 clients"),
    ],
)
def test_command_ends_with_one_line_and_an_exit_code(table: str, code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(table)
    ended = CliRunner().invoke(app, ["simulate", f"{tmp_path}/a.toml", "--out", f"{tmp_path}/out", "--json"])
    assert ended.exit_code == code
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert says in ended.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_of_rounds_cohort_and_losses(terminal: bool) -> None:
    console = Console(
        file=StringIO(), width=120, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"}
    )
    history = History()
    with RoundBar(Federation(), console) as bar:
        for client, event, facts in (
            ("", "round_open", {"round": 1, "cohort": ["a", "b"]}),
            ("a", "evaluation", {"round": 1, "loss": 3.5, "tokens": 9}),
            ("a", "step", {"round": 1, "step": 0, "loss": 4.25}),
            ("", "round_durable", {"round": 1}),
        ):
            history.take(client, event, facts)
            bar.hear(FederationEvent(client, event, facts), history)
    assert isinstance(console.file, StringIO)
    said = console.file.getvalue()
    assert "round 2/3" in said
    assert "training loss 4.250, held-out loss before 3.500" in said
    assert ("cohort 2" if terminal else "2 clients") in said
