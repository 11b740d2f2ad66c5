"""The ledger: durable before anything leaves, and it shows whatever was done to it."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from splitfl.errors import StorageError
from splitfl.privacy.accounting import epsilon_of
from splitfl.privacy.ledger import EVERYTHING, GENESIS, Ledger, Row


def row(record: bytes = b"a", *, sigma: float = 1.0, kind: str = "activations", tainted: bool = False) -> Row:
    return Row(record, kind, 1.0, sigma, 0, tainted, os.urandom(32), 10)


def test_rows_and_sums_survive_closing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row(b"a"), row(b"b", sigma=2.0), row(b"a", kind="gradients", sigma=0.5)])
    head, rows = ledger.head, list(ledger.rows())
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert (again.count, again.head, list(again.rows())) == (3, head, rows)
    assert again.spent == {b"a": 5.0, b"b": 0.25}
    assert again.spent_by_kind["gradients"] == {b"a": 4.0}
    assert again.releases == {"activations": 2, "gradients": 1}
    assert again.bytes == {"activations": 20, "gradients": 10}
    assert again.knows(rows[0][0].payload)
    assert not again.knows(bytes(32))


def test_rows_are_on_the_disk_itself_before_anything_leaves(tmp_path: Path) -> None:
    """Without FULL a power cut takes rows back that were announced; kill -9 does not show it."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger._file.execute("PRAGMA synchronous").fetchone() == (2,)
    assert ledger._file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_was_computed_from_several_records_and_counted_one_by_one_is_remembered(tmp_path: Path) -> None:
    for kind, expected in (
        ("activations", False),
        ("gradients", False),
        ("steps of DP-SGD", True),
        ("held-out losses", True),
    ):
        path = tmp_path / f"{kind}.sqlite"
        Ledger(path).append([row(kind=kind)])
        assert Ledger(path).joint_by_record == expected
    whole = Ledger(tmp_path / "client.sqlite")
    whole.append([row(EVERYTHING, kind="steps of DP-SGD")])
    assert not whole.joint_by_record


def test_a_ledger_holds_no_more_rights_than_its_owner_needs(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").append([row()])
    assert (tmp_path / "ledger.sqlite").stat().st_mode & 0o077 == 0


def test_rows_cannot_be_changed_or_deleted_by_sql(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").append([row(), row()])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as file:
        for statement in ("UPDATE rows SET sigma = 9", "DELETE FROM rows"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                file.execute(statement)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE rows SET sigma = 9 WHERE seq = 2",
        "UPDATE rows SET record = x'00' WHERE seq = 1",
        "DELETE FROM rows WHERE seq = 2",
        "DELETE FROM rows WHERE seq = 1",
        "UPDATE rows SET chain = x'00' WHERE seq = 3",
    ],
)
def test_tampering_shows_when_the_ledger_is_opened(tmp_path: Path, tampering: str) -> None:
    Ledger(tmp_path / "ledger.sqlite").append([row(), row(), row()])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as file:
        file.execute("DROP TRIGGER only_append")
        file.execute("DROP TRIGGER never_delete")
        file.execute(tampering)
    with pytest.raises(StorageError, match="damaged"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_shorter_copy_is_whole_in_itself_and_shows_against_a_countersigned_head(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row()])
    ledger.close()
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "older.sqlite")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row(), row()])
    older = Ledger(tmp_path / "older.sqlite")
    assert ledger.has_prefix(1, older.head)
    assert ledger.has_prefix(0, GENESIS)
    assert not older.has_prefix(ledger.count, ledger.head)
    older.append([row(), row()])  # as many rows, others
    assert not older.has_prefix(ledger.count, ledger.head)


def test_a_file_that_is_no_ledger_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database, whatever it looks like" * 100)
    with pytest.raises(StorageError, match="damaged") as caught:
        Ledger(tmp_path / "ledger.sqlite")
    assert "copy" in caught.value.remedy


def test_a_locked_ledger_takes_no_row(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="locked"):
        ledger.append([row()])
    other.execute("ROLLBACK")
    assert ledger.count == 0
    ledger.append([row()])
    assert ledger.count == 1


def test_a_read_only_ledger_takes_no_row(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger._file.execute("PRAGMA query_only = ON")  # root may write to any file, so this stands for a read-only one
    with pytest.raises(StorageError, match="readonly"):
        ledger.append([row()])
    assert ledger.count == 0


def test_a_full_disk_takes_no_row_and_loses_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row()])
    pages = ledger._file.execute("PRAGMA page_count").fetchone()[0]
    ledger._file.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "database or disk is full"
    with pytest.raises(StorageError, match="full"):
        ledger.append([row() for _ in range(2000)])
    ledger._file.execute("PRAGMA max_page_count = 1000000")
    ledger.append([row()])
    ledger.close()
    assert Ledger(tmp_path / "ledger.sqlite").count == 2


def test_a_clock_gone_backwards_stops_releases(tmp_path: Path) -> None:
    now = [1e9]
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=lambda: now[0])
    ledger.append([row()])
    now[0] -= 5  # a time server's correction
    ledger.append([row()])
    now[0] -= 3600
    with pytest.raises(StorageError, match="clock"):
        ledger.append([row()])
    assert [at for _, at, _ in ledger.rows()] == [1e9, 1e9]


def test_what_was_agreed_is_written_down_once_and_releases_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert not ledger.accepted(b"t" * 32)
    ledger.accept(b"t" * 32)
    ledger.accept(b"t" * 32)
    assert ledger.accepted(b"t" * 32)
    assert (ledger.count, dict(ledger.spent), dict(ledger.releases)) == (1, {}, {})


def test_releases_of_a_head_trained_without_dp_count_for_every_record_in_it(tmp_path: Path) -> None:
    """x is the first of 100 rows at mu = .1: counting its own alone would say an epsilon of .3407."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([Row(bytes([n]), "gradients", 0.1, 1.0, 0, True, bytes(32), 0) for n in range(100)])
    assert ledger.spent_on(bytes([0])) == pytest.approx(1.0)
    assert epsilon_of(math.sqrt(ledger.spent_on(bytes([0]))), 1e-5) == pytest.approx(4.3772, abs=1e-4)
    assert epsilon_of(0.1, 1e-5) == pytest.approx(0.3407, abs=1e-4)


def test_releases_that_nothing_taints_count_for_their_own_record_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row(b"a"), row(b"b", sigma=0.5)])
    assert (ledger.spent_on(b"a"), ledger.spent_on(b"b"), ledger.spent_on(b"c")) == (1.0, 4.0, 0.0)


def test_a_weight_update_without_noise_leaves_no_bound_for_anybody(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([row(b"a"), Row(EVERYTHING, "weights", 1.0, 0.0, 0, True, bytes(32), 0)])
    assert math.isinf(ledger.spent_on(b"a"))
    assert math.isinf(ledger.spent_on(b"never seen"))


WRITER = """
import sys, os
from pathlib import Path
from splitfl.privacy.ledger import Ledger, Row
ledger = Ledger(Path(sys.argv[1]))
number = 0
while True:
    ledger.append([Row(b"r", "activations", 1.0, 1.0, 0, False, os.urandom(32), 1)] * 3)
    number += 3
    os.write(1, b"%d\\n" % ledger.count)  # "sent"
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_kill_9_never_leaves_less_spent_than_sent(tmp_path: Path, after: int) -> None:
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    sent = [int(process.stdout.readline()) for _ in range(after)][-1]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split(b"\n")[:-1]
    process.wait()
    assert Ledger(path).count >= max([sent, *map(int, rest)])
