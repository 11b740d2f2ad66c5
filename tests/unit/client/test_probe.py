"""``splitfl probe --model``: what is measured, kept, weighed and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from client_model import probe as probing
from client_model.memory import Room
from client_model.plan_table import as_json, show, weigh
from client_model.probe import Prober
from client_model.probe_cli import look_at_folder, parse_link
from client_model.scouting import Scouted
from client_model.timing import Pace, Spread
from splitfl.config import Federation, parse_federation
from splitfl.errors import ConfigError, PlanError
from splitfl.planning.capability import LinkSpeed

CPU = torch.device("cpu")
LINK = LinkSpeed(0.02, 1e7, 1e7)
PACE = Pace(*(Spread(0.5 * seconds, seconds, 2 * seconds) for seconds in (2e-4, 1e-4, 3e-4)))


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which number formats were measured, in no time."""
    formats: list[str] = []

    def measure(_source: object, _settings: object, _device: object, dtype: str) -> Pace:
        formats.append(dtype)
        return PACE

    monkeypatch.setattr(probing, "measure_pace", measure)
    return formats


def look(model: Path, cache: Path, *, refresh: bool = False, federation: Path | None = None) -> Scouted:
    return look_at_folder(model, federation, LINK, CPU, cache, refresh=refresh)


def test_folder_without_a_federation_is_weighed_at_every_cut(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = look(small_model, tmp_path)
    weighed = weigh(found)
    allowed = {str(one.plan.cut) for one in weighed.candidates if not one.forbidden}
    assert allowed == {"0,0", "0,1", "0,2", "0,3", "1,0", "1,1", "1,2", "2,0", "2,1"}
    assert found.probe.base > 100 << 20  # torch alone is more
    show(found, weighed)
    shown = capsys.readouterr().out
    assert "<- taken" in shown
    assert "200 (100-400)" in shown
    assert weighed.why in " ".join(shown.split())


def test_json_has_what_was_measured_every_plan_and_the_choice(small_model: Path, tmp_path: Path) -> None:
    found = look(small_model, tmp_path)
    weighed = weigh(found)
    told = json.loads(json.dumps(as_json(found, weighed)))
    assert len(told["candidates"]) == len(weighed.candidates)
    assert told["choice"] in told["candidates"]
    assert told["machine"]["compute"]["bf16"]["block"] == {"low": 1e-4, "median": 2e-4, "high": 4e-4}
    assert told["why"] == weighed.why


def test_machine_that_is_too_small_is_told_what_is_missing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look(small_model, tmp_path)  # the pace is known by then
    monkeypatch.setattr(probing, "measure_room", lambda _: Room("the test", 1 << 20, 0))
    found = look(small_model, tmp_path)
    weighed = weigh(found)
    show(found, weighed)
    assert "memory: needs" in capsys.readouterr().out
    assert "missing" in weighed.why
    with pytest.raises(PlanError):
        weighed.require_choice()


def test_pace_is_kept_for_model_machine_and_what_it_depends_on(
    small_model: Path, tmp_path: Path, measured: list[str]
) -> None:
    look(small_model, tmp_path)
    look(small_model, tmp_path)
    assert measured == ["fp32", "bf16"]
    look(small_model, tmp_path, refresh=True)
    federation = tmp_path / "federation.toml"
    federation.write_text('[model]\ncompute = "fp32"\n')
    look(small_model, tmp_path, federation=federation)
    assert measured == ["fp32", "bf16"] * 2 + ["fp32"]


def test_damaged_measurements_are_made_anew(small_model: Path, tmp_path: Path, measured: list[str]) -> None:
    look(small_model, tmp_path)
    (kept,) = (tmp_path / "probes").iterdir()
    for junk in ("", "[]", '{"fp32": {"block": 3}}'):
        kept.write_text(junk)
        look(small_model, tmp_path)
    assert len(measured) == 8


def test_prober_tells_models_machines_and_threads_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(identity: str, **tables: object) -> Path:
        settings: Federation = parse_federation(tables, "the test")
        return Prober(identity, tmp_path, settings, CPU, tmp_path).kept

    models = ({}, {"train": "lora"}, {"train": "lora", "lora_rank": 64})
    places = [place("a", model=model) for model in models]
    places += [place("b"), place("a", batch={"max_length": 64}), place("a", optimizer={"name": "sgd"})]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert len({*places, place("a")}) == 7


def test_memory_too_short_for_a_block_is_one_clear_error(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> Pace:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(probing, "measure_pace", short)
    with pytest.raises(ConfigError, match="one block and the head do not fit"):
        look(small_model, tmp_path)


def test_nothing_is_tried_that_cannot_fit(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    monkeypatch.setattr(probing, "measure_room", lambda _: Room("the container", 1 << 20, 0))
    with pytest.raises(ConfigError, match=r"do not fit into this machine's memory \(the container\)"):
        look(small_model, tmp_path)
    assert measured == []


def test_link_is_read_in_the_units_of_its_flag() -> None:
    assert parse_link("20,100,50") == LinkSpeed(0.05, 2.5e6, 12.5e6)
    for wrong in ("", "1,2", "0,1,1", "a,b,c", "1,1,-1", "inf,1,1", "nan,1,1"):
        with pytest.raises(ConfigError, match="is no link"):
            parse_link(wrong)
