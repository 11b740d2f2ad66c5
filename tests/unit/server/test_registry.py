"""The books: a token works once, for one key, in time; names, revocations and races."""

from __future__ import annotations

import hashlib
import hmac
import re
import sqlite3
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from server_model.registry import RESERVE_BYTES, Issued, Registry
from splitfl.channel.joining import TOKEN
from splitfl.errors import ConfigError, RefusedError, StorageError

HOUR = 3600.0
FIRST_REMEDY = {
    "token_used": "Go on with the --state that used it",
    "token_unknown": "A newer invitation made this one",
}


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(tmp_path: Path, clock: Clock) -> Registry:
    return Registry(tmp_path / "clients.sqlite", clock)


def issue(serial: str, expires: float = 2_000_000.0) -> Issued:
    return Issued(serial, expires, f"certificate {serial}")


def enrol(books: Registry, token: str, serial: str, *, name: str = "ward-a", key: str = "key-1") -> str:
    return books.enrol(name, token, key, lambda: issue(serial))


def refusal(books: Registry, token: str, serial: str = "ff", *, name: str = "ward-a", key: str = "key-1") -> str:
    with pytest.raises(RefusedError) as caught:
        enrol(books, token, serial, name=name, key=key)
    assert "splitfl invite" in caught.value.remedy
    assert FIRST_REMEDY.get(caught.value.code, "") in caught.value.remedy
    return caught.value.code


def test_revocation_has_room_of_its_own_on_a_full_disk(books: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    enrol(books, books.invite("ward-a", HOUR), "01")
    assert books.reserve.stat().st_size == RESERVE_BYTES
    writing = Registry._writing

    def while_there_is_room(self: Registry) -> AbstractContextManager[sqlite3.Connection]:
        if self.reserve.exists():
            raise StorageError("cannot use the books: database or disk is full")
        return writing(self)

    monkeypatch.setattr(Registry, "_writing", while_there_is_room)
    with pytest.raises(StorageError):
        books.invite("ward-b", HOUR)
    books.revoke("ward-a")
    assert books.ended() == {"01": "revoked"}
    Registry(books.path)  # there is room again: for the next one
    assert books.reserve.exists()


def test_token_is_traded_for_a_certificate_that_is_let_in(books: Registry) -> None:
    assert enrol(books, books.invite("ward-a", HOUR), "01") == "certificate 01"
    books.admit("01", "ward-a")


def test_token_works_for_one_key_alone(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)
    enrol(books, token, "01")
    assert refusal(books, token, key="key-2") == "token_used"
    assert refusal(books, token, key="") == "token_used"


def test_same_key_gets_the_same_certificate_again_for_the_answer_may_be_lost(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)
    enrol(books, token, "01")
    assert enrol(books, token, "02") == "certificate 01"
    with pytest.raises(RefusedError):
        books.admit("02", "ward-a")


def test_token_ends_with_its_time(books: Registry, clock: Clock) -> None:
    token = books.invite("ward-a", HOUR)
    clock.now += HOUR + 1
    assert refusal(books, token) == "token_expired"


def test_token_is_what_a_join_string_takes_for_one(books: Registry) -> None:
    assert re.fullmatch(TOKEN, books.invite("ward-a", HOUR))


def test_token_of_another_name_or_none_is_unknown(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)
    assert refusal(books, token, name="ward-b") == "token_unknown"
    assert refusal(books, "x" * 43) == "token_unknown"
    assert refusal(books, "") == "token_unknown"


def test_newer_invitation_voids_the_unused_one(books: Registry) -> None:
    old, new = books.invite("ward-a", HOUR), books.invite("ward-a", HOUR)
    assert refusal(books, old) == "token_unknown"
    assert enrol(books, new, "01")


def test_failed_issue_leaves_the_token_good(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)

    def broken() -> Issued:
        raise RefusedError("no", "", code="bad_request")

    with pytest.raises(RefusedError):
        books.enrol("ward-a", token, "key-1", broken)
    assert enrol(books, token, "01", key="key-2")


def test_books_hold_no_token(books: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    token = books.invite("ward-a", HOUR)
    data = books.path.read_bytes()
    assert token.encode() not in data
    assert hashlib.sha256(token.encode()).hexdigest().encode() in data
    compared: list[str] = []

    def compare(left: str, right: str) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    enrol(books, token, "01")
    assert compared == [hashlib.sha256(token.encode()).hexdigest()]  # in constant time, and hashes at that


def test_of_many_clients_that_race_with_one_token_one_wins(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)
    begin, outcomes = threading.Barrier(8), []

    def race(number: int) -> None:
        mine = Registry(books.path, books.clock)
        begin.wait()
        try:
            outcomes.append(enrol(mine, token, f"{number:02x}", key=f"key-{number}"))
        except RefusedError as error:
            outcomes.append(error.code)

    racers = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(outcomes) == 8
    assert outcomes.count("token_used") == 7


def test_certificate_is_let_in_under_its_own_name_alone(books: Registry) -> None:
    enrol(books, books.invite("ward-a", HOUR), "01")
    with pytest.raises(RefusedError) as caught:
        books.admit("01", "ward-b")
    assert caught.value.code == "name_mismatch"


def test_certificate_out_of_no_book_is_unknown(books: Registry) -> None:
    with pytest.raises(RefusedError) as caught:
        books.admit("99", "ward-a")
    assert caught.value.code == "certificate_unknown"


def test_revoked_client_is_kept_out_and_its_token_is_void(books: Registry) -> None:
    token = books.invite("ward-a", HOUR)
    enrol(books, token, "01")
    pending = books.invite("ward-a", HOUR)
    books.revoke("ward-a")
    with pytest.raises(RefusedError) as caught:
        books.admit("01", "ward-a")
    assert caught.value.code == "revoked"
    assert books.ended() == {"01": "revoked"}
    assert refusal(books, token) == "revoked"
    assert refusal(books, pending) == "token_unknown"


def test_revoked_client_comes_back_by_a_new_invitation_and_its_old_certificate_does_not(books: Registry) -> None:
    enrol(books, books.invite("ward-a", HOUR), "01")
    books.revoke("ward-a")
    enrol(books, books.invite("ward-a", HOUR), "02", key="key-2")
    books.admit("02", "ward-a")
    with pytest.raises(RefusedError):
        books.admit("01", "ward-a")


def test_new_certificate_ends_the_older_one(books: Registry) -> None:
    enrol(books, books.invite("ward-a", HOUR), "01")
    enrol(books, books.invite("ward-a", HOUR), "02", key="key-2")
    enrol(books, books.invite("ward-b", HOUR), "03", name="ward-b")
    assert books.ended() == {"01": "replaced"}


def test_revoking_nobody_is_an_error(books: Registry) -> None:
    with pytest.raises(ConfigError, match="'ward-a'"):
        books.revoke("ward-a")


def test_invited_names_are_known_whatever_became_of_them(books: Registry) -> None:
    assert not books.knows("ward-a")
    enrol(books, books.invite("ward-a", HOUR), "01")
    books.revoke("ward-a")
    books.invite("ward-b", HOUR)
    assert books.knows("ward-a")
    assert books.knows("ward-b")


def test_list_says_what_became_of_everybody(books: Registry, clock: Clock) -> None:
    books.invite("invited", 10 * HOUR)
    books.invite("late", HOUR)
    for serial, name in (("01", "here"), ("02", "gone"), ("03", "again")):
        enrol(books, books.invite(name, HOUR), serial, name=name)
    books.enrol("old", books.invite("old", HOUR), "k", lambda: issue("04", clock.now + 1))
    books.admit("01", "here")
    books.revoke("gone")
    books.revoke("again")
    books.invite("again", 10 * HOUR)
    clock.now += 2 * HOUR
    found = {client.name: client for client in books.clients()}
    assert {name: client.status for name, client in found.items()} == {
        "again": "invited",
        "gone": "revoked",
        "here": "enrolled",
        "invited": "invited",
        "late": "invitation expired",
        "old": "certificate expired",
    }
    assert found["here"].last_seen == clock.now - 2 * HOUR
    assert found["invited"].last_seen == 0


def test_books_that_are_no_database_are_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "clients.sqlite"
    path.write_bytes(b"no database, " * 100)
    with pytest.raises(StorageError, match="backup"):
        Registry(path)


def test_books_that_another_process_holds_are_a_storage_error(books: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_model.registry.LOCK_S", 0.05)
    holder = sqlite3.connect(books.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="locked"):
        books.invite("ward-a", HOUR)
    holder.close()
    assert books.invite("ward-a", HOUR)
