"""The server remembers each client's ledger, signs what it remembers, and refuses one that went back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gates import open_gate

from server_model.witness import NOTHING, Witness
from splitfl.errors import PrivacyError, ProtocolError, RefusedError, StorageError
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.witness import Mark, check_not_older, check_signature

FIRST, SECOND = Mark(3, "ab" * 32), Mark(5, "cd" * 32)


def test_signature_holds_for_this_client_and_this_state_alone(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    signature = witness.countersign("ward", FIRST, proven=True)
    check_signature(witness.signer, "ward", FIRST, signature)
    for signer, client, mark in (
        ("00" * 32, "ward", FIRST),
        (witness.signer, "other", FIRST),
        (witness.signer, "ward", SECOND),
    ):
        with pytest.raises(ProtocolError, match="countersignature"):
            check_signature(signer, client, mark, signature)


def test_marks_and_key_survive_a_restart(tmp_path: Path) -> None:
    before = Witness(tmp_path)
    before.countersign("ward", FIRST, proven=True)
    after = Witness(tmp_path)
    assert (after.last("ward", proven=True), after.last("new", proven=True), after.signer) == (
        FIRST,
        NOTHING,
        before.signer,
    )
    assert (tmp_path / "signing.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("older", [FIRST, Mark(5, "00" * 32), NOTHING])
def test_ledger_that_went_back_is_refused(tmp_path: Path, older: Mark) -> None:
    witness = Witness(tmp_path)
    witness.countersign("ward", SECOND, proven=True)
    with pytest.raises(RefusedError) as caught:
        witness.countersign("ward", older, proven=True)
    assert caught.value.code == "ledger"
    assert witness.last("ward", proven=True) == SECOND
    witness.countersign("ward", SECOND, proven=True)  # the same again is no news


def test_stranger_on_a_plain_socket_cannot_spoil_a_name(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    witness.countersign("ward", SECOND, proven=False)
    assert witness.last("ward", proven=True) == NOTHING
    witness.countersign("ward", FIRST, proven=True)
    assert witness.last("ward", proven=False) == SECOND


def test_without_privacy_a_ledger_may_begin_anew(tmp_path: Path) -> None:
    witness = Witness(tmp_path, strict=False)
    for mark in (SECOND, FIRST):
        witness.countersign("ward", mark, proven=True)
        assert witness.last("ward", proven=True) == mark


def test_lost_key_of_a_private_federation_is_not_replaced_in_silence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"signing\.key is gone"):
        Witness(tmp_path, known=True)
    Witness(tmp_path, known=True, strict=False)
    Witness(tmp_path, known=True)


def test_damaged_note_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    (tmp_path / "ward.json").write_text('{"count": 3')
    with pytest.raises(StorageError, match=r"ward\.json"):
        witness.last("ward", proven=True)


def test_client_with_an_older_or_a_deleted_ledger_stops(tmp_path: Path) -> None:
    gate = open_gate(tmp_path / "client", "measured")
    gate.release_weights(0, {"w": torch.zeros(1)}, tmp_path / "update")
    gate.ledger.close()
    shutil.copytree(tmp_path / "client", tmp_path / "backup")
    now = open_gate(tmp_path / "client", "measured")
    now.release_weights(1, {"w": torch.ones(1)}, tmp_path / "update")  # the same weights again would be free
    mark = Mark(now.ledger.count, now.ledger.head.hex())
    check_not_older(now.ledger, mark)
    with pytest.raises(PrivacyError, match=r"ledger \(1 rows\).*countersigned \(2\)"):
        check_not_older(Ledger(tmp_path / "backup" / "ledger.sqlite"), mark)
    with pytest.raises(PrivacyError):
        check_not_older(Ledger(tmp_path / "fresh.sqlite"), mark)
