"""The server's cache of released activations: the same bytes or nothing, within its budget, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server_model.releases import HEADER_BYTES, Releases
from splitfl.wire.messages import TensorBytes

A, B, C = "aa" * 16, "bb" * 16, "cc" * 16


def activation(seed: int, time: int = 3, width: int = 8) -> TensorBytes:
    return TensorBytes("bf16", (time, width), bytes((seed + n) % 256 for n in range(2 * time * width)))


def same(one: TensorBytes | None, other: TensorBytes) -> bool:
    return one is not None and (one.dtype, one.shape, bytes(one.data)) == (other.dtype, other.shape, bytes(other.data))


def test_entries_come_back_byte_for_byte_and_after_a_restart(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20)
    assert cache.put("ward", A, activation(1))
    assert same(cache.get("ward", A), activation(1))
    assert cache.put("ward", B, activation(2, time=5))  # the file has grown behind the map
    assert same(cache.get("ward", B), activation(2, time=5))
    again = Releases(tmp_path, 1 << 20)
    assert same(again.get("ward", A), activation(1))
    assert same(again.get("ward", B), activation(2, time=5))
    assert again.size == cache.size


def test_clients_do_not_see_each_others_entries(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20)
    cache.put("ward-a", A, activation(1))
    assert not cache.holds("ward-b", A)
    assert cache.get("ward-b", A) is None


def test_what_has_no_room_is_not_taken_and_pushes_nothing_out(tmp_path: Path) -> None:
    entry = HEADER_BYTES + 64
    cache = Releases(tmp_path, 2 * entry)
    assert [cache.put("ward", name, activation(n)) for n, name in enumerate((A, B, C))] == [True, True, False]
    assert cache.put("ward", A, activation(0))  # it is there already
    assert same(cache.get("ward", A), activation(0))
    assert cache.get("ward", C) is None
    assert cache.size == 2 * entry
    assert not Releases(tmp_path / "none", 0).put("ward", A, activation(0))


def test_room_that_a_round_needs_is_not_taken(tmp_path: Path) -> None:
    assert not Releases(tmp_path, 1 << 20, reserve=1 << 60).put("ward", A, activation(1))
    assert Releases(tmp_path, 1 << 20, reserve=1).put("ward", A, activation(1))


def test_entries_that_gave_way_can_be_sent_again_and_are_there_after_a_restart(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20, terms="one")
    cache.put("a", A, activation(1))
    cache.put("b", A, activation(2))
    cache.give_way()
    assert (cache.size, list(tmp_path.glob("*.bin")), cache.get("a", A)) == (0, [], None)
    assert cache.put("a", A, activation(1))
    assert same(Releases(tmp_path, 1 << 20, terms="one").get("a", A), activation(1))


def test_damaged_entry_counts_as_missing_and_can_be_sent_again(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20)
    cache.put("ward", A, activation(1))
    cache.put("ward", B, activation(2))
    with (tmp_path / "ward.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 3)
        file.write(b"\xff")
    assert cache.get("ward", A) is None
    assert not cache.holds("ward", A)
    assert same(cache.get("ward", B), activation(2))
    assert cache.put("ward", A, activation(1))
    assert same(cache.get("ward", A), activation(1))


@pytest.mark.parametrize("left", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 10])
def test_entry_that_a_crash_cut_short_is_not_there_and_is_written_over(tmp_path: Path, left: int) -> None:
    cache = Releases(tmp_path, 1 << 20)
    cache.put("ward", A, activation(1))
    whole = cache.size
    cache.put("ward", B, activation(2))
    os.truncate(tmp_path / "ward.bin", whole + left)
    again = Releases(tmp_path, 1 << 20)
    assert (again.holds("ward", A), again.holds("ward", B), again.size) == (True, False, whole)
    assert again.put("ward", B, activation(2))
    assert same(Releases(tmp_path, 1 << 20).get("ward", B), activation(2))


def test_full_disk_means_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Releases(tmp_path, 1 << 20)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_append", full)
    assert not cache.put("ward", A, activation(1))
    assert cache.size == 0


def test_another_federation_begins_with_an_empty_cache(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20)
    cache.put("ward", A, activation(1))
    cache.clear()
    assert (cache.get("ward", A), cache.size) == (None, 0)
    assert not list(tmp_path.iterdir())


def test_other_terms_and_the_end_leave_nothing_behind(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20, terms="one")
    cache.put("ward", A, activation(1))
    assert Releases(tmp_path, 1 << 20, terms="one").holds("ward", A)
    other = Releases(tmp_path, 1 << 20, terms="two")
    assert not other.holds("ward", A)
    assert (other.size, list(tmp_path.glob("*.bin"))) == (0, [])
    other.put("ward", A, activation(1))
    other.clear()
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_mode & 0o077 == 0


def test_one_client_is_forgotten_and_gives_its_room_back(tmp_path: Path) -> None:
    cache = Releases(tmp_path, 1 << 20)
    for client in ("a", "b"):
        cache.put(client, A, activation(1))
    cache.forget("a")
    cache.forget("nobody")
    assert (cache.holds("a", A), cache.holds("b", A)) == (False, True)
    assert cache.size == Releases(tmp_path, 1 << 20).size == HEADER_BYTES + 64
