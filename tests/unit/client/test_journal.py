"""The journal: what was asked and answered comes back, a torn tail is cut off, and damage is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client_model.journal import Head, Journal
from splitfl.errors import StorageError
from splitfl.wire.frames import encode
from splitfl.wire.messages import Backward, Chunk, Fetch, Gradient, NextRound, RoundOpen, TensorBytes

KEY = bytes(range(32))
HEAD = Head("snapshots/round-000001", True, "token", 7)
SECRET = b"sixteen bytes!!!"


def backward(step: int, content: bytes = SECRET) -> Backward:
    return Backward(0, 0, 2, step, 0, TensorBytes("f32", (1, 1, 4), content))


def filled(path: Path) -> Journal:
    """Two gradients sent, the first of them answered."""
    journal = Journal(path, KEY)
    journal.begin(HEAD)
    for seq, step in ((7, 0), (8, 1)):
        journal.sent(seq, encode(backward(step)))
    answer = Gradient(7, 2, 0, 0)
    journal.answered(answer, b"".join(encode(answer)))
    return journal


def test_answered_request_is_answered_again_whatever_its_tensor(tmp_path: Path) -> None:
    filled(tmp_path / "journal")
    again = Journal(tmp_path / "journal", KEY)
    assert (again.head, again.next_seq, list(again.unanswered)) == (HEAD, 9, [8])
    reply = again.take(backward(0, bytes(16)))
    assert reply is not None
    assert reply.result() == Gradient(7, 2, 0, 0)
    assert again.take(backward(0)) is None  # once


def test_unanswered_request_waits_for_the_answer_to_what_was_sent(tmp_path: Path) -> None:
    filled(tmp_path / "journal")
    again = Journal(tmp_path / "journal", KEY)
    assert again.unanswered[8] == b"".join(encode(backward(1)))
    assert again.take(backward(1)) is again.waiting[8]
    assert again.doing_again  # the first one was not asked again yet


def test_piece_of_a_blob_is_fetched_again(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")
    fetch = Fetch(0, 0, "ab" * 32, 0, 1)
    journal.sent(9, encode(fetch))
    chunk = Chunk(9, "ab" * 32, 0, 1, TensorBytes("u8", (1,), b"x"))
    journal.answered(chunk, b"".join(encode(chunk)))
    again = Journal(tmp_path / "journal", KEY)
    assert again.take(fetch) is None
    assert list(again.unanswered) == [8]


def test_what_is_decided_while_the_session_is_lost_is_still_said(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")

    def make() -> list[int]:
        journal.lost()
        return [3, 1]

    assert journal.once("step 2 0", make) == [3, 1]


def test_what_was_decided_is_decided_once(tmp_path: Path) -> None:
    filled(tmp_path / "journal").once("step 2 0", lambda: [3, 1])
    again = Journal(tmp_path / "journal", KEY)
    assert again.once("step 2 0", lambda: pytest.fail("drawn again")) == [3, 1]
    assert again.last_step == (2, 0)


def test_nothing_of_it_lies_in_the_clear(tmp_path: Path) -> None:
    filled(tmp_path / "journal")
    data = (tmp_path / "journal").read_bytes()
    assert SECRET not in data
    assert b"token" not in data


def test_torn_tail_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = filled(path)
    whole = path.stat().st_size
    journal.sent(9, encode(NextRound(9, 7, 2)))
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        assert Journal(path, KEY).next_seq == 9
        assert path.stat().st_size == whole
    path.write_bytes(data)
    assert Journal(path, KEY).next_seq == 10


def test_changed_byte_is_damage_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StorageError, match=r"journal is damaged\. Delete"):
            Journal(path, KEY)


def test_lost_session_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")
    journal.lost()
    assert journal.head is None
    assert not (tmp_path / "journal").exists()
    journal.answered(RoundOpen(8, 2, ""), b"late")
    assert not (tmp_path / "journal").exists()


def test_head_alone_holds_until_the_next_request(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", KEY)
    journal.begin(HEAD, only_head=True)
    assert Journal(tmp_path / "journal", KEY).head == HEAD
    journal.sent(7, encode(NextRound(7, 7, 2)))
    assert Journal(tmp_path / "journal", KEY).head is None


def test_full_disk_keeps_what_was_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = filled(tmp_path / "journal")
    end, write = (tmp_path / "journal").stat().st_size, os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if offset > end:
            raise OSError(28, "No space left on device")
        return write(handle, data[:20], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device"):
        journal.sent(9, encode(NextRound(9, 7, 2)))
    monkeypatch.undo()
    journal.sent(9, encode(NextRound(9, 7, 2)))
    assert Journal(tmp_path / "journal", KEY).next_seq == 10


def test_journal_without_a_place_keeps_nothing() -> None:
    journal = Journal()
    journal.begin(HEAD)
    journal.sent(7, encode(backward(0)))
    assert journal.take(backward(0)) is None
    assert journal.head is None
