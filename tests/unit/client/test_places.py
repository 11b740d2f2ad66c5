"""Where a client's files lie when nobody says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_model.places import default_cache, default_key, default_state


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("STATE", "CACHE", "CONFIG"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    return tmp_path


def test_state_of_two_clients_or_two_servers_lies_apart() -> None:
    places = {default_state(f"ws://127.0.0.1:{port}", name) for port in (1, 2) for name in ("a", "b")}
    assert len(places) == 4
    assert all(place.is_absolute() and ":" not in place.name for place in places)


def test_state_is_found_again_when_the_server_has_moved() -> None:
    here, there = (default_state(f"wss://{host}:7000", "a", "ab" * 32) for host in ("10.0.0.1", "trunk.example.org"))
    assert here == there
    assert len({here, default_state("wss://10.0.0.1:7000", "a", "cd" * 32), default_state("wss://x:1", "b", "ab")}) == 3


def test_state_that_is_named_after_an_address_is_still_found() -> None:
    earlier = default_state("wss://10.0.0.1:7000", "a")
    earlier.mkdir(parents=True)
    assert default_state("wss://10.0.0.1:7000", "a", "ab" * 32) == earlier


def test_places_are_under_the_home_or_where_xdg_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def places() -> list[Path]:
        return [default_state("ws://x:1", "a").parent, default_cache(), default_key("ab").parent]

    assert places() == [home / ".local/state/splitfl", home / ".cache/splitfl/blobs", home / ".config/splitfl/keys"]
    for name in ("STATE", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", f"/xdg/{name}")
    assert places() == [Path("/xdg/STATE/splitfl"), Path("/xdg/CACHE/splitfl/blobs"), Path("/xdg/CONFIG/splitfl/keys")]
