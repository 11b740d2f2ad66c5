"""The vault gives back the same bytes, to whoever has the key, or nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from splitfl.errors import StorageError
from splitfl.privacy.vault import Vault

KEY = bytes(range(32))


def test_entries_come_back_byte_for_byte(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault.sqlite", KEY)
    vault.put([(b"x/1", b"first"), (b"x/2", b""), (b"y/1", bytes(100_000))])
    vault.close()
    again = Vault(tmp_path / "vault.sqlite", KEY)
    assert (again.get(b"x/1"), again.get(b"x/2"), again.get(b"y/1")) == (b"first", b"", bytes(100_000))
    assert again.get(b"z") is None
    assert again.names(b"x/") == [b"x/1", b"x/2"]


def test_the_disk_shows_none_of_it(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault.sqlite", KEY)
    vault.put([(b"name", b"what the patient said" * 50)])
    vault.close()
    assert all(b"patient" not in path.read_bytes() for path in tmp_path.iterdir())


def test_another_key_and_tampered_or_swapped_entries_are_refused(tmp_path: Path) -> None:
    Vault(tmp_path / "vault.sqlite", KEY).put([(b"a", b"one"), (b"b", b"two")])
    with pytest.raises(StorageError, match="key"):
        Vault(tmp_path / "vault.sqlite", bytes(32)).get(b"a")
    with sqlite3.connect(tmp_path / "vault.sqlite") as file:
        file.execute("UPDATE entries SET sealed = (SELECT sealed FROM entries WHERE name = x'62') WHERE name = x'61'")
    with pytest.raises(StorageError, match="changed"):
        Vault(tmp_path / "vault.sqlite", KEY).get(b"a")
