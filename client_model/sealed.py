"""An append-only file of sealed entries, for what must not lie in the clear and must not be lost.

    MAGIC | id (16) | entry | entry | ...
    entry = u32 length | u32 CRC-32 of the length | nonce (12) | AES-256-GCM of the content

The file's id and the entry's number are authenticated with it, so entries cannot change places. An entry that a
crash left half-written is recognised and cut off: what it was about had not happened yet. Anything else that does not
fit is damage. Entries are handed to the operating system before ``append`` returns: they outlive the process, and the
last of them may not outlive the machine's power.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitfl.errors import StorageError
from splitfl.files import storage_errors, write_file

MAGIC = b"SPLITFL1"
ID_BYTES, NONCE_BYTES, TAG_BYTES = 16, 12, 16
LENGTHS = struct.Struct("<II")


class SealedFile:
    """Entries by number, from 0. Raises StorageError; after a failed ``append`` the older entries are whole."""

    def __init__(self, path: Path, key: bytes) -> None:
        """Open a file that :meth:`create` made, and cut off a torn tail. Raises StorageError for damage."""
        self.path = path
        self._cipher = AESGCM(key)
        self._places: list[tuple[int, int]] = []  # offset and length of each entry's nonce and content
        with storage_errors(path):
            self._file: BinaryIO = path.open("r+b", buffering=0)
            self._end = self._find_entries(os.fstat(self._file.fileno()).st_size)
            self._file.truncate(self._end)

    @classmethod
    def create(cls, path: Path, key: bytes, first: bytes) -> SealedFile:
        """A new file with its first entry, durable when this returns, in place of an older one."""
        identity = secrets.token_bytes(ID_BYTES)
        write_file(path, MAGIC + identity + seal(AESGCM(key), identity, 0, first))
        return cls(path, key)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[bytes]:
        """The entries in order. Raises StorageError for one that was changed."""
        return (self.read(number) for number in range(len(self)))

    def read(self, number: int) -> bytes:
        """One entry. Raises StorageError when it was changed."""
        offset, length = self._places[number]
        with storage_errors(self.path):
            sealed = os.pread(self._file.fileno(), length, offset)
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place(self._id, number))
        except (InvalidTag, ValueError):
            raise damage(self.path) from None

    def append(self, content: bytes) -> int:
        """Write an entry; returns its number."""
        data = seal(self._cipher, self._id, len(self), content)
        with storage_errors(self.path):
            try:
                self._write(data)
            except OSError:
                self._file.truncate(self._end)
                raise
        self._places.append((self._end + LENGTHS.size, len(data) - LENGTHS.size))
        self._end += len(data)
        return len(self) - 1

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        """All of it, at the end: a full disk takes a part first and fails then."""
        view, done = memoryview(data), 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), view[done:], self._end + done)

    def _find_entries(self, size: int) -> int:
        """Remember where the entries lie; returns where the last whole one ends."""
        start = len(MAGIC) + ID_BYTES
        head = os.pread(self._file.fileno(), start, 0)
        if len(head) < start or not head.startswith(MAGIC):
            raise damage(self.path)
        self._id = head[len(MAGIC) :]
        while size - start >= LENGTHS.size:
            lengths = os.pread(self._file.fileno(), LENGTHS.size, start)
            length, check = LENGTHS.unpack(lengths)
            if check != zlib.crc32(lengths[:4]) or length < NONCE_BYTES + TAG_BYTES:
                raise damage(self.path)
            if length > size - start - LENGTHS.size:
                break
            self._places.append((start + LENGTHS.size, length))
            start += LENGTHS.size + length
        return start


def seal(cipher: AESGCM, identity: bytes, number: int, content: bytes) -> bytes:
    """An entry as it lies in the file."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    sealed = nonce + cipher.encrypt(nonce, content, place(identity, number))
    length = struct.pack("<I", len(sealed))
    return length + struct.pack("<I", zlib.crc32(length)) + sealed


def place(identity: bytes, number: int) -> bytes:
    """What is authenticated with an entry."""
    return identity + number.to_bytes(8, "little")


def damage(path: Path) -> StorageError:
    return StorageError(f"{path} is damaged", f"Delete {path}: the client then goes on from its last snapshot.")
