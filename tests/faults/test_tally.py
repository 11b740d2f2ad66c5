"""What left is counted over all starts of a client; a start that was cut short is said to be uncounted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pause import STEPS, participant, service, take_part

from client_model.events import Event
from client_model.participant import PausedError
from client_model.store import ClientStore
from splitfl.errors import StorageError
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello


def whole_report(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    with service(model, folder / "server") as running:
        link = MemoryLink(running, Hello(PROTOCOL_VERSIONS, "a"))
        return participant(folder, data).run(link, link.open(), URL)


def start(running: MemoryService, folder: Path, data: Path, stop_after: tuple[int, int] | None = None) -> Any:
    """One start of the client; it pauses after that step. Its report and events."""
    events: list[Event] = []
    client = participant(folder, data, events.append)
    client.stop = lambda: stop_after in [(e.facts["round"], e.facts["step"]) for e in events if e.event == "step"]
    return take_part(running, client), events


def test_report_after_a_pause_counts_what_left_before_it(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    undisturbed = whole_report(tmp_path / "whole", small_model, wards["a"])
    with service(small_model, tmp_path / "server") as running:
        with pytest.raises(PausedError):
            start(running, tmp_path, wards["a"], (1, STEPS - 2))
        report, _ = start(running, tmp_path, wards["a"])
    assert report["privacy"]["left"] == undisturbed["privacy"]["left"]
    assert (report["starts"], report["uncounted_starts"], report["rounds_taken"]) == (2, 0, 2)
    assert report["bytes"]["bytes_sent"] >= undisturbed["bytes"]["bytes_sent"]


def test_start_that_was_cut_short_is_said_to_be_uncounted(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    store = ClientStore(tmp_path / "client")
    store.save_tally(replace(store.tally(), starts=1, open=True))
    with service(small_model, tmp_path / "server") as running:
        report, _ = start(running, tmp_path, wards["a"])
    assert (report["starts"], report["uncounted_starts"]) == (2, 1)
    assert report["privacy"]["left"]["activations"]["releases"] == 2 * STEPS
    assert not ClientStore(tmp_path / "client").tally().open


def test_closing_report_is_forgotten_when_there_are_rounds_again(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    store = ClientStore(tmp_path / "client")
    store.save_closing({"client": "a"})
    with service(small_model, tmp_path / "server") as running:
        with pytest.raises(PausedError):
            start(running, tmp_path, wards["a"], (0, 0))
        assert store.closing() is None
        report, _ = start(running, tmp_path, wards["a"])
    kept = store.closing()
    assert kept is not None
    assert kept["held_out_losses"] == report["held_out_losses"]


def test_privacy_mode_is_said_before_anything_leaves(tmp_path: Path, small_model: Path, wards: dict[str, Path]) -> None:
    with service(small_model, tmp_path / "server") as running:
        _, events = start(running, tmp_path, wards["a"])
    names = [event.event for event in events]
    assert names.index("privacy") < min(names.index("evaluation"), names.index("step"))


def test_every_event_and_every_key_of_the_report_is_documented(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "joining.md").read_text()
    with service(small_model, tmp_path / "server") as running:
        report, events = start(running, tmp_path, wards["a"])
    for name in {*report, *report["data"], *report["privacy"], *(event.event for event in events)}:
        assert f"`{name}`" in page


def test_changed_data_file_is_said(tmp_path: Path, small_model: Path, wards: dict[str, Path]) -> None:
    with service(small_model, tmp_path / "server") as running:
        with pytest.raises(PausedError):
            start(running, tmp_path, wards["a"], (0, 0))
        os.utime(wards["a"], ns=(1, 1))
        _, events = start(running, tmp_path, wards["a"])
    assert "data_changed" in [event.event for event in events]


def test_damaged_tally_is_refused_and_not_begun_anew(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    (tmp_path / "tally.json").write_text('{"starts": 3')
    with pytest.raises(StorageError, match=r"tally\.json cannot be read"):
        store.tally()
