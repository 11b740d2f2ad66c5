"""The client's secret: outside the state folder, made once, and never made anew where a ledger has begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_model.keys import ClientKey, default_key, identity_of, open_key
from splitfl.errors import PrivacyError, StorageError


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = open_key(tmp_path, tmp_path / "key", may_create=True)
    assert len(first.secret) == 32
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert open_key(tmp_path, tmp_path / "key", may_create=False) == first


def test_a_missing_key_is_not_made_anew_beside_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="counted anew"):
        open_key(tmp_path, tmp_path / "key", may_create=False)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(StorageError, match="no key of 32 bytes"):
        open_key(tmp_path, tmp_path / "key", may_create=True)


def test_a_key_lies_outside_the_state_folder_under_the_folders_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    state = tmp_path / "state"
    state.mkdir()
    open_key(state, None, may_create=True)
    path = default_key(identity_of(state))
    assert path.is_file()
    assert path.is_relative_to(tmp_path / "config")


def test_no_two_purposes_and_no_two_federations_share_a_derived_key() -> None:
    keys = [ClientKey(bytes(32), identity) for identity in ("one", "two")]
    derived = {key.derived(purpose) for key in keys for purpose in ("vault", "names", "records")}
    assert len(derived) == 6
    assert ClientKey(bytes(31) + b"1", "one").derived("vault") not in derived
    assert ClientKey(bytes(32), "one").derived("vault") in derived
