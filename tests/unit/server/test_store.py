"""The service's state folder: rounds that are whole or not there, the last three kept, never another federation's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from server_model.store import KEPT_ROUNDS, PARTS, RoundState, Store
from splitfl.config import Federation, parse_federation
from splitfl.errors import ConfigError, StorageError

SETTINGS = Federation()


def state(round_: int, value: float = 1.0) -> RoundState:
    tensors = {"w": torch.full((2, 3), value)}
    return RoundState(
        round_,
        tensors,
        {"w/exp_avg": torch.zeros(2, 3)},
        {"head": torch.ones(4)},
        {"seed": 7},
        {"head/momentum": torch.full((4,), 2.0)},
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.begin(tmp_path, SETTINGS, "model", resume=False)
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_comes_back_as_it_was_saved(store: Store) -> None:
    store.save(state(3))
    back = store.load(3)
    assert back.round == 3
    assert torch.equal(back.trunk["w"], torch.ones(2, 3))
    assert torch.equal(back.optimizer["w/exp_avg"], torch.zeros(2, 3))
    assert torch.equal(back.merged["head"], torch.ones(4))
    assert torch.equal(back.strategy["head/momentum"], torch.full((4,), 2.0))
    assert back.facts["seed"] == 7


def test_round_without_any_merged_weights_comes_back(store: Store) -> None:
    store.save(RoundState(0, {}, {}, {}, {}))
    assert dict(store.load(0).merged) == {}


def test_last_rounds_are_kept_and_older_ones_deleted(store: Store) -> None:
    for number in range(KEPT_ROUNDS + 2):
        store.save(state(number))
        deleted = store.prune()
    assert store.durable_rounds() == [2, 3, 4]
    assert deleted == [store.folder_of(1)]
    assert names(store.rounds) == ["round-000002", "round-000003", "round-000004"]


def test_rounds_are_ordered_by_number(store: Store) -> None:
    for number in (10, 9, 2):
        store.save(state(number))
    assert store.durable_rounds() == [2, 9, 10]


def test_round_in_which_a_bit_has_flipped_is_not_gone_on_from(store: Store) -> None:
    path = store.save(state(1)) / "trunk.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match="round-000001 cannot be read"):
        store.load(1)
    path.write_bytes(whole)
    assert torch.equal(store.load(1).trunk["w"], torch.ones(2, 3))
    assert "sha256" not in store.load(1).facts


def test_round_of_an_earlier_version_is_read_without_digests(store: Store) -> None:
    path = store.save(state(1)) / "state.json"
    facts = json.loads(path.read_text())
    del facts["sha256"]
    path.write_text(json.dumps(facts))
    assert store.load(1).facts["seed"] == 7


def test_start_on_a_full_disk_clears_what_clients_had_sent_and_writes_nothing_it_holds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(state(0))
    (store.uploads / "a.part").write_bytes(bytes(99))
    (store.rounds / ".new-1").mkdir()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "replace", full)
    Store(store.folder).begin(store.folder.parent, SETTINGS, "model", resume=True)
    assert names(store.uploads) == []
    assert names(store.rounds) == ["round-000000"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk_leaves_the_older_rounds_whole(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store.save(state(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(StorageError, match="No space left on device"):
        store.save(state(1))
    monkeypatch.undo()
    assert store.durable_rounds() == [0]
    assert names(store.rounds) == ["round-000000"]
    store.load(0)
    store.save(state(1))  # there is room again
    assert store.durable_rounds() == [0, 1]


@pytest.mark.parametrize("file", [*(f"{part}.safetensors" for part in PARTS), "state.json"])
@pytest.mark.parametrize("damage", [b"", b"\xff" * 30, None])
def test_damaged_round_is_named_and_the_one_before_it_too(store: Store, file: str, damage: bytes | None) -> None:
    store.save(state(0))
    store.save(state(1))
    path = store.folder_of(1) / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(StorageError, match=r"round-000001 cannot be read.*--resume uses that"):
        store.load(1)
    store.load(0)


def test_folder_that_holds_rounds_is_refused_without_resume(store: Store, tmp_path: Path) -> None:
    store.save(state(0))
    with pytest.raises(ConfigError, match="already holds a federation"):
        Store(store.folder).begin(tmp_path, SETTINGS, "model", resume=False)
    Store(store.folder).begin(tmp_path, SETTINGS, "model", resume=True)
    assert store.durable_rounds() == [0]


def test_folder_without_a_round_may_be_begun_anew(store: Store, tmp_path: Path) -> None:
    changed = parse_federation({"seed": 5}, "the test")
    Store(store.folder).begin(tmp_path, changed, "model", resume=False)
    assert store.federation() == (tmp_path, changed)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 5}, "seed"),
        ({"model": {"train": "lora"}}, "model"),
        ({"merge": {"share": "top"}}, "merge"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name"),
    ],
)
def test_resume_with_settings_that_the_rounds_cannot_take_is_refused(
    store: Store, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    store.save(state(0))
    with pytest.raises(ConfigError, match=f"{field} differs"):
        store.begin(tmp_path, parse_federation(change, "the test"), "model", resume=True)
    assert store.federation()[1] == SETTINGS


@pytest.mark.parametrize(
    "change", [{"rounds": {"count": 9}}, {"optimizer": {"learning_rate": 1e-4}}, {"trunk": {"grace_s": 1.0}}]
)
def test_resume_may_go_on_longer_or_slower(store: Store, tmp_path: Path, change: dict[str, Any]) -> None:
    store.save(state(0))
    changed = parse_federation(change, "the test")
    store.begin(tmp_path, changed, "model", resume=True)
    assert store.federation()[1] == changed


def test_beginning_clears_uploads_and_what_a_crash_left_half_written(store: Store, tmp_path: Path) -> None:
    store.save(state(0))
    (store.rounds / ".new-abc").mkdir()
    (store.rounds / ".new-abc/trunk.safetensors").write_text("half")
    (store.uploads / "a.part").write_text("half")
    store.begin(tmp_path, SETTINGS, "model", resume=True)
    assert names(store.rounds) == ["round-000000"]
    assert names(store.uploads) == []


def test_folder_of_something_else_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a state folder"):
        Store(tmp_path).federation()


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"model": 3, "settings": {}}'])
def test_damaged_record_is_a_storage_error(store: Store, text: str) -> None:
    (store.folder / "federation.json").write_text(text)
    with pytest.raises(StorageError, match=r"federation\.json cannot be read"):
        store.federation()


def test_record_with_settings_of_another_release_names_the_field(store: Store) -> None:
    content = {"model": "m", "fingerprint": "f", "settings": {"rounds": {"epochs": 3}}}
    (store.folder / "federation.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"rounds\.epochs"):
        store.federation()


def test_state_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Store(tmp_path / "file").begin(tmp_path, SETTINGS, "model", resume=False)
