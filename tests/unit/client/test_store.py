"""A client's state folder: snapshots that are whole or not there, and the way back to its session."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_model.store import KEPT_SNAPSHOTS, ClientStore, SessionRecord, Snapshot, Tally
from splitfl.errors import StorageError


def snapshot(round_: int, value: float = 1.0, step: int = 0) -> Snapshot:
    return Snapshot(
        round_, step, 100, (2, 17), (1, 1), {"head": torch.full((2, 3), value)}, {"head/exp_avg": torch.zeros(2, 3)}
    )


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "state")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_snapshot_comes_back_as_it_was_saved(store: ClientStore) -> None:
    store.save(snapshot(4, 3.5, step=10))
    back = store.newest(4)
    assert back is not None
    assert (back.round, back.step, back.tokens, back.cursor, back.cut) == (4, 10, 100, (2, 17), (1, 1))
    assert torch.equal(back.weights["head"], torch.full((2, 3), 3.5))
    assert torch.equal(back.optimizer["head/exp_avg"], torch.zeros(2, 3))


def test_newest_snapshot_is_the_last_one_that_the_server_has_too(store: ClientStore) -> None:
    for number in (6, 7):
        store.save(snapshot(number, number))
    back = store.newest(6)
    assert back is not None
    assert back.round == 6
    assert store.rounds() == [6]  # the server has lost round 7


def test_server_that_lost_everything_brings_the_client_to_its_start(store: ClientStore) -> None:
    store.save(snapshot(0))
    assert store.newest(-1) is None
    assert store.rounds() == []


def test_fresh_folder_holds_nothing(store: ClientStore) -> None:
    assert store.session() is None
    assert store.newest(9) is None
    assert store.rounds() == []


def test_two_snapshots_are_kept(store: ClientStore) -> None:
    for number in range(4):
        store.save(snapshot(number))
    assert store.rounds() == [2, 3]
    assert len(store.rounds()) == KEPT_SNAPSHOTS


def test_snapshot_that_a_round_began_from_is_the_newest_before_it(store: ClientStore) -> None:
    assert store.before(3) is None
    for number in (1, 3):
        store.save(snapshot(number))
    assert store.before(1) is None
    for round_ in (2, 3):
        before = store.before(round_)
        assert before is not None
        assert before.round == 1
    assert store.rounds() == [1, 3]  # nothing is forgotten


def test_damage_to_an_older_snapshot_does_not_matter(store: ClientStore) -> None:
    store.save(snapshot(0))
    store.save(snapshot(1))
    (store.snapshots / "round-000000/state.json").write_text("broken")
    back = store.newest(1)
    assert back is not None
    assert back.round == 1


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff" * 20, None])
def test_damaged_snapshot_is_named_with_its_remedy(store: ClientStore, file: str, damage: bytes | None) -> None:
    store.save(snapshot(0))
    path = store.snapshots / "round-000000" / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(StorageError, match=r"round-000000 cannot be read\. Delete .*round-000000"):
        store.newest(0)


def test_pause_is_kept_until_it_is_forgotten(store: ClientStore) -> None:
    name = store.save_pause(snapshot(2, step=7))
    back = store.read(name)
    assert (back.round, back.step) == (2, 7)
    store.forget_pause()
    with pytest.raises(StorageError, match="cannot be read"):
        store.read(name)


def test_pause_does_not_count_as_a_round(store: ClientStore) -> None:
    store.save_pause(snapshot(2))
    assert store.rounds() == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk_leaves_the_older_snapshot_whole(
    store: ClientStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.save(snapshot(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(StorageError, match=r"No space left on device\. Free some space"):
        store.save(snapshot(1))
    monkeypatch.undo()
    assert names(store.snapshots) == ["round-000000"]
    assert store.newest(0) is not None


def test_session_comes_back_as_it_was_saved(store: ClientStore) -> None:
    record = SessionRecord("ward", "ws://127.0.0.1:7000", "token", "incarnation", "ab" * 32)
    store.save_session(record)
    assert ClientStore(store.folder).session() == record


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"name": "ward"}', '{"name": "w", "url": "u", "odd": 1}'])
def test_damaged_session_is_named_with_its_remedy(store: ClientStore, text: str) -> None:
    (store.folder / "client.json").write_text(text)
    with pytest.raises(StorageError, match=r"client\.json cannot be read\. Delete the folder"):
        store.session()


def test_folder_is_private(store: ClientStore) -> None:
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_leftovers_of_a_crash_are_cleared(store: ClientStore) -> None:
    store.save(snapshot(0))
    (store.snapshots / ".new-abc").mkdir()
    (store.folder / ".new-def").write_text("half")
    again = ClientStore(store.folder)
    assert names(again.snapshots) == ["round-000000"]
    assert ".new-def" not in names(again.folder)


def test_merged_weights_replace_older_ones_as_a_whole(store: ClientStore) -> None:
    for value in (1.0, 2.0):
        path = store.save_merged({"head": torch.full((2,), value)})
    assert load_file(path)["head"].tolist() == [2.0, 2.0]
    assert [name for name in names(store.folder) if name.startswith("merged")] == ["merged.safetensors"]


def test_merged_weights_on_a_full_disk_are_a_storage_error(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    path = store.save_merged({"head": torch.ones(2)})
    monkeypatch.setattr("splitfl.codec.stored.save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        store.save_merged({"head": torch.zeros(2)})
    assert load_file(path)["head"].tolist() == [1.0, 1.0]


def test_state_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        ClientStore(tmp_path / "file")


def test_closing_report_is_kept_with_what_is_counted_by_now_until_there_are_rounds_again(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "state")
    assert store.closing() is None
    store.save_closing({"client": "ward", "starts": 1, "bytes": {}})
    store.save_tally(Tally(starts=2, uncounted_starts=1, open=True, bytes_sent=3, bytes_received=4))
    counted = {"starts": 2, "uncounted_starts": 2, "bytes": {"bytes_sent": 3, "bytes_received": 4}}
    assert ClientStore(tmp_path / "state").closing() == {"client": "ward"} | counted
    (tmp_path / "state/closing.json").write_text("{")
    with pytest.raises(StorageError, match=r"closing\.json cannot be read"):
        store.closing()
    store.forget_closing()
    assert store.closing() is None


def test_scratch_file_goes_when_it_has_served_and_at_the_next_start_after_a_kill(store: ClientStore) -> None:
    with store.scratch("update.safetensors") as path:
        path.write_bytes(b"weights")
    assert not path.exists()
    path.write_bytes(b"weights")  # as a kill leaves it
    ClientStore(store.folder)
    assert not path.exists()
