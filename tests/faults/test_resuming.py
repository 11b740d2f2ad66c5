"""A client that comes back with less than it left with: it is not resumed, or told what is missing, by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbing import assert_same, final_weights
from test_o6 import Place, settings

from splitfl.errors import ConfigError
from splitfl.lab.memory import URL, MemoryService

ALONE = settings(rounds={"count": 2, "local_steps": 2})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]) -> Path:
    """The server's state after a run that nothing disturbed."""
    place = Place(tmp_path_factory.mktemp("whole"), small_model, wards, ALONE)
    with place.service() as service:
        place.run(service, "a")
    return place.folder / "server"


@pytest.fixture
def place(tmp_path: Path, small_model: Path, wards: dict[str, Path]) -> Place:
    """One client whose data file may be changed."""
    data = Path(shutil.copy(wards["a"], tmp_path / "a.jsonl"))
    return Place(tmp_path, small_model, {"a": data}, ALONE)


@pytest.fixture
def service(place: Place) -> Iterator[MemoryService]:
    """A service that client ``a`` has left in the middle of a round, killed."""
    with place.service() as running:
        assert place.run_to_death(running, dies_at=60, after=True)[1]
        assert (place.folder / "a" / "journal").exists()
        yield running


def test_changed_data_file_stops_a_round_that_is_done_again_and_is_named_with_the_remedy(
    place: Place, service: MemoryService, whole: Path
) -> None:
    data, journal = place.data["a"], place.folder / "a" / "journal"
    before, times = data.read_bytes(), data.stat()
    data.write_bytes(before + b'{"text": "one more"}\n')
    kept = journal.read_bytes()
    for _ in range(2):  # and it is as clear when it is tried again
        with pytest.raises(ConfigError, match=r"a\.jsonl has changed in the middle of a round") as refused:
            place.run(service, "a")
        assert f"time of change included (cp -p), or delete {journal}" in refused.value.remedy
        assert journal.read_bytes()[: len(kept)] == kept
    data.write_bytes(before)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    place.run(service, "a")
    assert_same(final_weights(place.folder / "server"), final_weights(whole))


def test_changed_data_file_is_taken_once_the_journal_is_deleted_as_the_remedy_says(
    place: Place, service: MemoryService
) -> None:
    data = place.data["a"]
    data.write_bytes(data.read_bytes() + b'{"text": "one more"}\n')
    (place.folder / "a" / "journal").unlink()
    client, link = place.start(service, "a")
    welcome = link.open()
    assert not welcome.resumed
    report = client.run(link, welcome, URL)
    assert (report["rounds"], report["data"]["rows"]) == (2, 41)


def test_client_whose_journal_lost_its_end_is_not_resumed_and_takes_part_anew(
    place: Place, service: MemoryService
) -> None:
    """A power cut may cost a journal what the disk said it had: it says a number that the server has seen."""
    journal = place.folder / "a" / "journal"
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) // 2])
    client, link = place.start(service, "a")
    assert link.next_seq > 0
    welcome = link.open()
    assert not welcome.resumed
    assert not journal.exists()  # nothing of it may be asked again under new numbers
    assert client.run(link, welcome, URL)["rounds"] == 2
