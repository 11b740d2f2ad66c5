"""Noised bytes that have left or are about to, encrypted, on the client's own disk.

A record's activation is noised once; whenever it must be sent again it comes from here, byte for byte, for a second
draw would tell more. Samples for the audit lie here too. Clean activations are never written anywhere.

AES-256-GCM; the entry's name is authenticated with it. The key is the caller's: it lies outside the state folder.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitfl.errors import StorageError
from splitfl.privacy.ledger import ledger_errors
from splitfl.wire.messages import TensorBytes

NONCE_BYTES = 12
SCHEMA = "CREATE TABLE IF NOT EXISTS entries (name BLOB PRIMARY KEY, sealed BLOB NOT NULL) STRICT, WITHOUT ROWID"


class Vault:
    """Named byte strings in one SQLite file. Raises StorageError."""

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._cipher = AESGCM(key)
        with ledger_errors(path):
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
            path.chmod(0o600)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.execute(SCHEMA)

    def put(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Write (name, data) pairs in one transaction, durable when this returns; one that is there is replaced."""
        sealed = [(name, self._seal(name, data)) for name, data in entries]
        with ledger_errors(self.path):
            self._file.execute("BEGIN IMMEDIATE")
            try:
                self._file.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", sealed)
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def get(self, name: bytes) -> bytes | None:
        """The data of an entry, None when there is none. Raises StorageError when it was tampered with."""
        with ledger_errors(self.path):
            found = self._file.execute("SELECT sealed FROM entries WHERE name = ?", (name,)).fetchone()
        if found is None:
            return None
        sealed: bytes = found[0]
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name)
        except InvalidTag:
            raise StorageError(
                f"an entry of {self.path} was changed, or this is not its key",
                "Put back the key or a whole copy of the state folder; nothing of this entry has left.",
            ) from None

    def names(self, prefix: bytes = b"") -> list[bytes]:
        """Names that begin with ``prefix``, in order."""
        query = "SELECT name FROM entries WHERE name >= ? AND name < ? ORDER BY name"
        with ledger_errors(self.path):
            return [name for (name,) in self._file.execute(query, (prefix, prefix + b"\xff" * 64))]

    def _seal(self, name: bytes, data: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, name)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def pack(payload: TensorBytes) -> bytes:
    """A tensor as the vault keeps it."""
    return bytes(msgpack.packb((payload.dtype, list(payload.shape), bytes(payload.data))))


def unpack(data: bytes) -> TensorBytes:
    """A tensor out of the vault."""
    dtype, shape, content = msgpack.unpackb(data)
    return TensorBytes(dtype, tuple(shape), content)
