"""The client's own secret: it names records and locks the vault. It lies outside the state folder.

Whoever copies the state folder alone learns neither which records took part nor what they released. Whoever has the
whole disk has the key too, unless ``--key`` puts it on another medium.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client_model.places import default_key
from splitfl.errors import PrivacyError, StorageError
from splitfl.files import storage_errors, write_file

KEY_BYTES = 32


@dataclass(frozen=True)
class ClientKey:
    """32 random bytes, and what is derived from them for the state folder with this ``identity``."""

    secret: bytes
    identity: str

    def derived(self, purpose: str) -> bytes:
        """32 bytes for one purpose in one federation (HKDF, RFC 5869); no two tell of one another."""
        info = f"splitfl {self.identity} {purpose}".encode()
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(self.secret)


def open_key(state: Path, key_file: Path | None, *, may_create: bool) -> ClientKey:
    """The key of a state folder, or a fresh one. Raises PrivacyError when it is missing and must not be made anew."""
    identity = identity_of(state)
    path = default_key(identity) if key_file is None else key_file
    if not path.exists():
        if not may_create:
            raise PrivacyError(
                f"the key {path} is missing, and without it records would be counted anew",
                "Put it back from a copy, or name it with --key.",
            )
        write_file(path, secrets.token_bytes(KEY_BYTES))  # the file is made with mode 0600
    with storage_errors(path):
        path.chmod(0o600)
        secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise StorageError(f"{path} is no key of {KEY_BYTES} bytes", "Put it back from a copy, or name another --key.")
    return ClientKey(secret, identity)


def identity_of(state: Path) -> str:
    """The state folder's own random name: it names the key file, and parts federations that share one."""
    path = state / "key-id"
    if not path.exists():
        write_file(path, secrets.token_hex(16).encode())
    with storage_errors(path):
        return path.read_text().strip()
