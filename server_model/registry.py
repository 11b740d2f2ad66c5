"""Who was invited, who has enrolled, who was revoked: one SQLite file that commands and the service share.

``splitfl invite``, ``revoke`` and ``clients`` write and read it while the service runs; each look of the service is a
fresh one. Of a token it holds the SHA-256 alone. Trading a token is one transaction, so of two clients that race with
one token a single one wins.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from splitfl.channel.joining import TOKEN_BYTES
from splitfl.errors import ConfigError, RefusedError, StorageError

LOCK_S = 10.0  # how long to wait for another process that writes
RESERVE_BYTES = 1 << 16  # of the disk, for a revocation when it is full

SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    token_hash TEXT PRIMARY KEY, name TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL,
    key_hash TEXT NOT NULL DEFAULT '', serial TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, issued REAL NOT NULL, expires REAL NOT NULL, pem TEXT NOT NULL,
    ended TEXT NOT NULL DEFAULT '', seen REAL NOT NULL DEFAULT 0
);
"""

Status = Literal["invited", "invitation expired", "enrolled", "certificate expired", "revoked"]


@dataclass(frozen=True)
class Issued:
    """A certificate as it goes into the books. Times are seconds since 1970."""

    serial: str
    expires: float
    pem: str


@dataclass(frozen=True)
class Client:
    """One line of ``splitfl clients``. Times are seconds since 1970, 0 where there is none."""

    name: str
    status: Status
    invited_until: float
    certificate_until: float
    last_seen: float


class Registry:
    """The books in the file ``path``. Every method raises StorageError when the file cannot be used.

    Beside them lies a file of nothing: clients can fill the disk, and whoever does it must not be safe from revocation.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.reserve = path.with_name("reserve")
        self.clock = clock
        with database_errors(path):
            path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=LOCK_S)
            connection.executescript(SCHEMA)
            connection.close()
        if not self.reserve.exists():
            with suppress(OSError):
                self.reserve.write_bytes(bytes(RESERVE_BYTES))

    # -- invitations -------------------------------------------------------------------------------------------

    def invite(self, name: str, valid_s: float) -> str:
        """A new token for ``name``; an earlier one that nobody has used is void."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        with self._writing() as books:
            books.execute("DELETE FROM invitations WHERE name = ? AND serial = ''", (name,))
            now = self.clock()
            row = (hash_token(token), name, now, now + valid_s)
            books.execute("INSERT INTO invitations (token_hash, name, created, expires) VALUES (?, ?, ?, ?)", row)
        return token

    def enrol(self, name: str, token: str, key_hash: str, issue: Callable[[], Issued]) -> str:
        """Trade a token for the certificate that ``issue`` makes, as PEM; the client's earlier ones end.

        The same token with the same key gets its certificate again: an answer may have been lost on the way.
        Raises RefusedError.
        """
        with self._writing() as books:
            row = find_invitation(books, name, token)
            if row["serial"]:
                return certificate_again(books, row, key_hash)
            if row["expires"] < self.clock():
                raise refused("token_expired", "the invitation of this join string is over")
            issued = issue()
            books.execute("UPDATE certificates SET ended = 'replaced' WHERE name = ? AND ended = ''", (name,))
            books.execute(
                "INSERT INTO certificates (serial, name, issued, expires, pem) VALUES (?, ?, ?, ?, ?)",
                (issued.serial, name, self.clock(), issued.expires, issued.pem),
            )
            books.execute(
                "UPDATE invitations SET key_hash = ?, serial = ? WHERE token_hash = ?",
                (key_hash, issued.serial, row["token_hash"]),
            )
        return issued.pem

    # -- certificates ------------------------------------------------------------------------------------------

    def admit(self, serial: str, name: str) -> None:
        """Let the holder of a certificate in as ``name``, and note when if the disk has room. Raises RefusedError."""
        with self._books() as books:
            row = books.execute("SELECT * FROM certificates WHERE serial = ?", (serial,)).fetchone()
            if row is None:
                raise refused("certificate_unknown", "this server has no record of the client's certificate")
            if row["ended"]:
                raise ended(row["ended"])
            if row["name"] != name:
                raise RefusedError(
                    f"the certificate is {row['name']!r}'s, and cannot join as {name!r}",
                    "Join under the certificate's own name.",
                    code="name_mismatch",
                )
        with suppress(StorageError), self._writing() as books:
            books.execute("UPDATE certificates SET seen = ? WHERE serial = ?", (self.clock(), serial))

    def knows(self, name: str) -> bool:
        """Whether this name belongs to somebody who was invited, and is not to be had without a certificate."""
        query = "SELECT name FROM invitations WHERE name = ?1 UNION SELECT name FROM certificates WHERE name = ?1"
        with self._books() as books:
            return books.execute(query, (name,)).fetchone() is not None

    def ended(self) -> dict[str, str]:
        """Serial numbers of certificates that are no longer good, and why."""
        with self._books() as books:
            return dict(map(tuple, books.execute("SELECT serial, ended FROM certificates WHERE ended != ''")))

    def revoke(self, name: str) -> None:
        """End every certificate and open invitation of a client. Raises ConfigError when there is none."""
        try:
            self._revoke(name)
        except StorageError:
            if not self.reserve.exists():
                raise
            self.reserve.unlink()
            self._revoke(name)

    def _revoke(self, name: str) -> None:
        with self._writing() as books:
            certificates = books.execute(
                "UPDATE certificates SET ended = 'revoked' WHERE name = ? AND ended != 'revoked'", (name,)
            )
            invitations = books.execute("DELETE FROM invitations WHERE name = ? AND serial = ''", (name,))
            if not certificates.rowcount and not invitations.rowcount:
                raise ConfigError(
                    f"no client {name!r} has a certificate or an open invitation here",
                    "See `splitfl clients --state STATE`.",
                )

    def clients(self) -> list[Client]:
        """Everybody who was ever invited, by name."""
        with self._books() as books:
            open_ = books.execute("SELECT name, expires FROM invitations WHERE serial = ''").fetchall()
            certificates = books.execute("SELECT * FROM certificates ORDER BY issued, rowid").fetchall()
        invited = {row["name"]: row["expires"] for row in open_}
        newest = {row["name"]: row for row in certificates}  # the last of each name
        return [self._client(name, invited.get(name, 0.0), newest.get(name)) for name in sorted({*invited, *newest})]

    def _client(self, name: str, invited_until: float, certificate: sqlite3.Row | None) -> Client:
        now = self.clock()
        if certificate is None:
            status: Status = "invited" if invited_until >= now else "invitation expired"
            return Client(name, status, invited_until, 0.0, 0.0)
        if certificate["ended"]:
            status = "revoked"
        else:
            status = "enrolled" if certificate["expires"] >= now else "certificate expired"
        if status != "enrolled" and invited_until >= now:
            status = "invited"
        return Client(name, status, invited_until, certificate["expires"], certificate["seen"])

    # -- the file ----------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, durable when the block ends well, undone when it raises."""
        with self._books() as books:
            books.execute("PRAGMA synchronous = FULL")
            books.execute("BEGIN IMMEDIATE")
            yield books
            books.execute("COMMIT")

    @contextmanager
    def _books(self) -> Iterator[sqlite3.Connection]:
        with database_errors(self.path):
            books = sqlite3.connect(self.path, timeout=LOCK_S, isolation_level=None)
            try:
                books.row_factory = sqlite3.Row
                yield books
            finally:
                books.close()  # rolls back what was not committed


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def find_invitation(books: sqlite3.Connection, name: str, token: str) -> sqlite3.Row:
    """The invitation of ``name`` with this token, compared in constant time. Raises RefusedError."""
    digest, found = hash_token(token), None
    for row in books.execute("SELECT * FROM invitations WHERE name = ?", (name,)).fetchall():
        if hmac.compare_digest(row["token_hash"], digest):
            found = row
    if found is None:
        reason = f"no invitation of {name!r} has this token"
        raise refused("token_unknown", reason, "A newer invitation made this one void, or it is mistyped.")
    return found  # type: ignore[no-any-return]


def certificate_again(books: sqlite3.Connection, invitation: sqlite3.Row, key_hash: str) -> str:
    """The certificate that this token was traded for, if the same key asks. Raises RefusedError."""
    row = books.execute("SELECT * FROM certificates WHERE serial = ?", (invitation["serial"],)).fetchone()
    if row is None or not hmac.compare_digest(invitation["key_hash"], key_hash):
        reason = "this join string has been used already, from another state folder"
        raise refused("token_used", reason, "Go on with the --state that used it; if that was not you, say so.")
    if row["ended"]:
        raise ended(row["ended"])
    return str(row["pem"])


def ended(why: str) -> RefusedError:
    if why == "replaced":
        return refused("revoked", "this client's certificate was replaced by a newer one")
    return refused("revoked", "the server's operator has revoked this client")


def refused(code: str, reason: str, first: str = "") -> RefusedError:
    """A refusal whose remedy is a new invitation, if ``first`` does not help."""
    remedy = f"{first} Ask the server's operator for a new join string (splitfl invite)."
    return RefusedError(reason, remedy.lstrip(), code=code)


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk say into a StorageError that names ``path``."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"cannot use {path}: {error}", "Free some space, or put the file back from a backup; then try again."
        ) from error
