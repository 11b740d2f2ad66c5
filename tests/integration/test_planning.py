"""Probe, plan and join between processes, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Place, Server, place

from splitfl.data.notes import write_notes

SETTINGS: dict[str, dict[str, Any]] = {
    "rounds": {"count": 2, "local_steps": 2},
    "batch": {"records": 4, "max_length": 32},
    "model": {"min_bottom": 0, "max_bottom": 1, "min_top": 1, "max_top": 2, "freeze_below": 1},
    "evaluation": {"records": 4},
}


@pytest.fixture
def here(small_model: Path, tmp_path: Path) -> Iterator[Place]:
    write_notes(tmp_path / "a.jsonl", "cardiology", 24, 1)
    with place(tmp_path / "place", small_model) as opened:
        yield opened


def probe(server: Server, *flags: object) -> dict[str, Any]:
    """What ``splitfl probe`` says of a served model."""
    folder = server.place.folder
    places = ("--state", folder / "client-a", "--cache", folder / "cache", "--threads", 1)
    command = server.place.run("probe", "probe", server.url, "--name", "a", *places, "--json", *flags)
    assert command.wait() == 0, command.story()
    told: dict[str, Any] = json.loads(command.stdout)
    return told


def test_client_trains_by_the_plan_that_its_probe_shows(here: Place, tmp_path: Path) -> None:
    server = here.serve(SETTINGS)
    told = probe(server)
    choice = told["choice"]
    assert choice in told["candidates"]
    assert choice["refused"] == ""
    assert told["machine"]["link"]["up"]["median"] > 0
    assert {one["plan"]["codec"] for one in told["candidates"]} == {"bf16", "int8"}
    client = here.join(server.url, "a", tmp_path / "a.jsonl", "--plan", "auto")
    assert client.wait() == 0, client.story()
    assert "plan: cut" in client.stderr
    assert "computed here), " in client.stderr  # a cut in words
    kept = json.loads((here.folder / "client-a" / "plan.json").read_text())["choices"]
    assert client.report["cut"] == f"{kept['cut']['n_bottom']},{kept['cut']['n_top']}"
    assert client.report["rounds_taken"] == 2


def test_pace_is_measured_once_for_a_model_and_machine(here: Place) -> None:
    server = here.serve(SETTINGS)
    first = probe(server)["machine"]["compute"]
    (kept,) = (here.folder / "cache" / "probes").iterdir()
    assert json.loads(kept.read_text()) == first
    marked = json.dumps(first).replace(json.dumps(first["fp32"]["head"]["median"]), "0.125")
    kept.write_text(marked)
    assert probe(server)["machine"]["compute"]["fp32"]["head"]["median"] == 0.125
    assert probe(server, "--refresh")["machine"]["compute"]["fp32"]["head"]["median"] != 0.125


def test_probe_fetches_a_block_and_the_head_and_no_other(here: Place) -> None:
    server = here.serve(SETTINGS)
    probe(server)
    blobs = [path for path in (here.folder / "cache").iterdir() if path.is_file()]
    matrices, head, norms = 7, 1, 1  # norms that nothing has trained are all the same bytes
    assert len(blobs) == matrices + head + norms


def test_federations_floor_overrules_a_plan(here: Place, tmp_path: Path) -> None:
    server = here.serve(SETTINGS)
    client = here.join(server.url, "a", tmp_path / "a.jsonl", "--plan", "2,1")
    assert client.wait() == 7, client.story()
    assert "cut 2,1 is not allowed here" in client.error


def test_no_visit_in_the_middle_of_a_round(here: Place, tmp_path: Path) -> None:
    server = here.serve({**SETTINGS, "rounds": {"count": 1, "local_steps": 1000}})
    client = here.join(server.url, "a", tmp_path / "a.jsonl", "--plan", "1,1")
    client.wait_for("step")
    client.interrupt()
    assert client.wait() == 130
    folder = here.folder / "client-a"
    refused = here.run("probe", "probe", server.url, "--name", "a", "--state", folder, "--cache", here.folder / "cache")
    assert refused.wait() == 2
    assert "in the middle of a round" in refused.error
    again = here.join(server.url, "a", tmp_path / "a.jsonl", "--plan", "auto")  # and auto finishes it as it was begun
    again.wait_for("resumed")
    again.wait_for("step")
    assert "measuring" not in again.stderr
