"""What a simulation is told and what it remembers: settings refused by name, a journal that a kill cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitfl.config import parse_section
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.lab.federation import FederationEvent
from splitfl.lab.simulate.history import Journal
from splitfl.lab.simulate.settings import Simulation, load_simulation


def settings(**tables: Any) -> Simulation:
    return parse_section(Simulation, {"partition": {"clients": 6}, **tables}, "the test", "the page")


def test_half_written_event_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.write(FederationEvent("", "round_open", {"round": 0, "cohort": ["a"]}))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"client": "a", "eve')
    again = Journal(tmp_path / "events.jsonl")
    again.write(FederationEvent("a", "step", {"round": 0, "step": 0, "loss": 2.0}))
    history = Journal(tmp_path / "events.jsonl").history
    assert history.cohorts == {0: ["a"]}
    assert history.training_loss(0) == 2.0


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"nonsense": {}}, "nonsense: Extra inputs"),
        ({"partition": {"kind": "odd"}}, "partition.kind"),
        ({"partition": {"alpha": 0}}, "partition.alpha"),
        ({"partition": {"clients": 2000}}, "partition.clients"),
        ({"federation": {"rounds": {"counts": 1}}}, "federation.rounds.counts: Extra inputs"),
        ({"federation": {"rounds": {"min_clients": 9}}}, "min_clients = 9, but partition.clients = 6"),
        ({"data": {"path": "a.jsonl"}}, "set data.group"),
        ({"data": {"path": "a.jsonl", "rows": 4}}, "leave out specialties, rows and seed"),
        ({"data": {"group": "ward"}}, "the group of a note is its specialty"),
        ({"data": {"specialties": ["cardiology", "astrology"]}}, "specialties are, once each, some of general"),
        ({"model": {"folder": "base", "layers": 4}}, "leave out the other fields"),
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
