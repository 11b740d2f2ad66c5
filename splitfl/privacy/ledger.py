"""The ledger: what has left this client, durable before it leaves.

One SQLite file in the client's state folder, append-only, a row for each release. Rows are chained by SHA-256, so a
changed or missing one shows; head and count are countersigned by the server, so a deleted or older ledger shows too
(``splitfl.privacy.witness``). ``synchronous = FULL``: when ``append`` returns, the rows survive a power cut. It holds
no text and no token: a record is a keyed hash.

Columns: seq, record, kind, sensitivity, sigma, round, tainted, time, payload, nbytes, chain. ``payload`` is the SHA-256
of the bytes that leave; empty for a step of DP-SGD, of which nothing leaves but weights, later. ``tainted`` marks
releases that depend on weights trained on private records without DP.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from enum import Enum
from pathlib import Path

import msgpack

from splitfl.errors import StorageError
from splitfl.files import sync
from splitfl.privacy.accounting import mu_squared

GENESIS = bytes(32)  # the chain's value before the first row
EVERYTHING = b""  # the record of a row that no single record stands for: a weight update
AGREEMENT = "agreement"  # kind of the rows that say what was agreed to; they release nothing
CLOCK_SLACK_S = 120.0  # how far the clock may go back: time servers correct by less


class ReleaseKind(Enum):
    """What can be computed from a record and leave."""

    ACTIVATION = "activations"
    HELD_OUT_ACTIVATION = "activations of held-out records"
    GRADIENT = "gradients"
    DP_SGD = "steps of DP-SGD"
    WEIGHTS = "weights"
    METRIC = "held-out losses"


#: kinds that are computed from several records at once
JOINT = {ReleaseKind.DP_SGD.value, ReleaseKind.METRIC.value}

SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY, record BLOB NOT NULL, kind TEXT NOT NULL, sensitivity REAL NOT NULL, sigma REAL NOT NULL,
    round INTEGER NOT NULL, tainted INTEGER NOT NULL, time REAL NOT NULL, payload BLOB NOT NULL,
    nbytes INTEGER NOT NULL, chain BLOB NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS only_append BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS never_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SELECT = "SELECT record, kind, sensitivity, sigma, round, tainted, payload, nbytes, time, chain FROM rows ORDER BY seq"


@dataclass(frozen=True)
class Row:
    """One release. L2 ``sensitivity`` between replace-one neighbours and ``sigma`` of the noise, in one unit."""

    record: bytes
    kind: str
    sensitivity: float
    sigma: float
    round: int
    tainted: bool
    payload: bytes
    nbytes: int

    @property
    def mu_squared(self) -> float:
        """What it adds to the mu^2 of whatever it depends on; infinite without noise."""
        return mu_squared(self.sensitivity, self.sigma)

    @property
    def charged_to(self) -> bytes:
        """Whose mu^2 that is: the record's; everybody's, where weights that learned from everybody went into it."""
        return EVERYTHING if self.tainted else self.record


class Ledger:
    """An open ledger; its sums are kept in memory. Raises StorageError for a file that cannot be trusted or used."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self.count = 0
        self.head = GENESIS
        self.latest = 0.0  # seconds since 1970 of the newest row
        self.spent: defaultdict[bytes, float] = defaultdict(float)  # record -> mu^2 of the rows charged to it
        self.spent_by_kind: defaultdict[str, defaultdict[bytes, float]] = defaultdict(lambda: defaultdict(float))
        self.total = 0.0  # mu^2 of all rows
        self.tainted: set[str] = set()  # kinds with a release that depended on weights trained without DP
        self.releases: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._payloads: set[bytes] = set()
        self.joint_by_record = False  # something joint was counted record by record: not enough for a whole client
        self._agreement = b""  # the terms that were accepted last
        with ledger_errors(path):
            fresh = not path.exists()
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
            path.chmod(0o600)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(SCHEMA)
            if fresh:
                sync(path.parent)
            self._read()

    def _read(self) -> None:
        """Check the chain from its first row and add everything up."""
        for row, at, chain in self.rows():
            if chain != link(self.head, row, at):
                raise damaged(self.path, f"row {self.count + 1} is not the one that was written")
            self._count(row, at, chain)
        last = self._file.execute("SELECT max(seq) FROM rows").fetchone()[0]
        if last is not None and last != self.count:
            raise damaged(self.path, "rows are missing")

    def rows(self) -> Iterator[tuple[Row, float, bytes]]:
        """All rows, oldest first, each with its time and the chain's value after it."""
        for record, kind, sensitivity, sigma, round_, tainted, payload, nbytes, at, chain in self._file.execute(SELECT):
            yield Row(record, kind, sensitivity, sigma, round_, bool(tainted), payload, nbytes), at, chain

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows in one transaction; they are durable when this returns. Raises StorageError; then none is there,
        and nothing may leave."""
        if not rows:
            return
        now = self._time()
        head, chains, written = self.head, [], []
        for number, row in enumerate(rows):
            head = link(head, row, now)
            chains.append(head)
            values = (row.record, row.kind, row.sensitivity, row.sigma, row.round, int(row.tainted), now)
            written.append((self.count + 1 + number, *values, row.payload, row.nbytes, head))
        with ledger_errors(self.path):
            self._file.execute("BEGIN IMMEDIATE")
            try:
                self._file.executemany(INSERT, written)
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise
        for row, chain in zip(rows, chains, strict=True):
            self._count(row, now, chain)

    def _time(self) -> float:
        now = self._clock()
        if now < self.latest - CLOCK_SLACK_S:
            raise StorageError(
                f"this machine's clock is {self.latest - now:.0f} s before the last row of {self.path}",
                "Set the clock, then start again; nothing leaves until then.",
            )
        return max(now, self.latest)

    def _count(self, row: Row, at: float, chain: bytes) -> None:
        self.count, self.head, self.latest = self.count + 1, chain, at
        if row.kind == AGREEMENT:
            self._agreement = row.payload
            return
        self.releases[row.kind] += 1
        self.bytes[row.kind] += row.nbytes
        if row.payload:
            self._payloads.add(row.payload)
        self.total += row.mu_squared
        self.spent[row.charged_to] += row.mu_squared
        self.spent_by_kind[row.kind][row.charged_to] += row.mu_squared
        self.joint_by_record |= row.kind in JOINT and row.record != EVERYTHING
        if row.tainted:
            self.tainted.add(row.kind)

    def spent_on(self, record: bytes) -> float:
        """mu^2 of a record: of its own rows, of those that no single record stands for, and of every tainted row.

        State that was trained on a record without DP carries it into whatever is computed from that state, whichever
        record the release belongs to; rows from before the record's first are counted too.
        """
        shared = self.spent.get(EVERYTHING, 0.0)
        return shared if record == EVERYTHING else shared + self.spent.get(record, 0.0)

    def knows(self, payload: bytes) -> bool:
        """Whether these bytes (their SHA-256) are paid for: sending them, again too, is free."""
        return payload in self._payloads

    def accept(self, agreement: bytes) -> None:
        """Write down that terms (their SHA-256) were accepted."""
        if not self.accepted(agreement):
            self.append([Row(EVERYTHING, AGREEMENT, 0.0, 0.0, -1, False, agreement, 0)])

    def accepted(self, agreement: bytes) -> bool:
        """Whether these terms are the ones that were accepted last: going back to older ones is a change too."""
        return agreement == self._agreement

    def has_prefix(self, count: int, head: bytes) -> bool:
        """Whether the chain's value after ``count`` rows is ``head``: False for a ledger that lost or changed rows."""
        if count == 0:
            return head == GENESIS
        found = self._file.execute("SELECT chain FROM rows WHERE seq = ?", (count,)).fetchone()
        return found is not None and found[0] == head

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def link(head: bytes, row: Row, at: float) -> bytes:
    """The chain's value after a row."""
    return hashlib.sha256(head + msgpack.packb((*astuple(row), at))).digest()


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """What SQLite or the disk says, as one clear error: nothing leaves without its row."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise StorageError(
            f"cannot write the ledger {path}: {error}",
            "Free some space, let go of other programs that use it, or make it writable; nothing leaves until then.",
        ) from error
    except sqlite3.DatabaseError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, how: str) -> StorageError:
    return StorageError(
        f"the ledger {path} is damaged: {how}",
        "Put back a whole copy of the newest state folder; without it nobody can say what has left.",
    )
