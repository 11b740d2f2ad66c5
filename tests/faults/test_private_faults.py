"""With privacy on: killed clients, killed servers and lost caches cost bandwidth, and never a second draw."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import Place, Settings, with_settings

from splitfl.errors import PrivacyError, StorageError
from splitfl.privacy.ledger import Ledger

SETTINGS: Settings = {
    "rounds": {"count": 2, "local_steps": 12},
    "batch": {"records": 4, "max_length": 32},
    "evaluation": {"records": 4, "baselines": "none"},
    "privacy": {"mode": "measured"},
    "trunk": {"grace_s": 3.0},
}


def spent_once(state: Path) -> int:
    """Checks that no record was released twice; returns how many rows the ledger has."""
    ledger = Ledger(state / "ledger.sqlite")
    rows = [row for row, _, _ in ledger.rows() if row.kind.startswith("activations")]
    assert len({row.record for row in rows}) == len(rows)
    assert len({row.payload for row in rows}) == len(rows)
    ledger.close()
    return ledger.count


@pytest.mark.parametrize("after", [1, 5])
def test_killed_client_goes_on_with_the_same_releases(place: Place, wards: dict[str, Path], after: int) -> None:
    server = place.serve(SETTINGS)
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", count=after)
    client.kill()
    before = spent_once(place.folder / "client-a")
    again = place.join(server.url, "a", wards["a"])
    assert again.wait() == 0, again.story()
    assert spent_once(place.folder / "client-a") >= before
    assert server.command.wait() == 0
    left = again.report["privacy"]["left"]["activations"]
    assert left["releases"] <= again.report["data"]["train_records"]


def test_restarted_server_that_lost_its_cache_gets_the_same_bytes_again(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(with_settings(SETTINGS, rounds={"local_steps": 20}))
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", round=1, step=1)
    server.command.kill()
    shutil.rmtree(place.folder / "server" / "releases")
    server = server.again()
    assert client.wait() == 0, client.story()
    assert server.command.wait() == 0
    spent_once(place.folder / "client-a")
    assert client.named("server_restarted")


def test_server_with_another_key_stops_clients_that_wait_for_it(place: Place, wards: dict[str, Path]) -> None:
    """A restart is when the books may have gone back, or be another's: what was agreed to before is asked again."""
    server = place.serve(with_settings(SETTINGS, rounds={"local_steps": 40}))
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", step=1)
    server.command.kill()
    shutil.rmtree(place.folder / "server" / "ledgers")
    server.again()
    assert client.wait() == PrivacyError.exit_code, client.story()
    assert "another key" in client.error


def test_private_federation_does_not_go_on_with_a_new_key(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", round=1, step=1)
    server.command.kill()
    shutil.rmtree(place.folder / "server" / "ledgers")
    again = server.again(wait=False)
    assert again.command.wait() == StorageError.exit_code
    assert "ledgers" in again.command.error
    client.kill()


def test_books_that_cannot_be_written_hold_private_clients_up_and_end_none(
    place: Place, wards: dict[str, Path]
) -> None:
    server = place.serve(with_settings(SETTINGS, rounds={"local_steps": 20}))
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", step=2)
    books, away = place.folder / "server" / "ledgers", place.folder / "away"
    books.rename(away)
    books.touch()  # a file where the folder was: nothing can be written into it
    server.command.wait_for("storage_error")
    books.unlink()
    away.rename(books)
    assert client.wait() == 0, client.story()
    assert server.command.wait() == 0


def test_damaged_cache_entry_is_sent_again(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(with_settings(SETTINGS, rounds={"local_steps": 30}))
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("step", round=0, step=12)  # an epoch is over
    cache = place.folder / "server" / "releases" / "a.bin"
    with cache.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff\xff")
    assert client.wait() == 0, client.story()
    assert server.command.wait() == 0
    spent_once(place.folder / "client-a")
