"""The client's own secret: it names records and locks the vault. It lies outside the state folder.

Whoever copies the state folder alone learns neither which records took part nor what they released. Whoever has the
whole disk has the key too, unless ``--key`` puts it on another medium.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.errors import PrivacyError, StorageError
from splitfl.files import storage_errors, write_file

KEY_BYTES = 32


@dataclass(frozen=True)
class ClientKey:
    """32 random bytes, and what is derived from them."""

    secret: bytes

    def derived(self, purpose: str) -> bytes:
        """32 bytes for one purpose (HKDF, RFC 5869); no purpose tells of another."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"splitfl {purpose}".encode()).derive(self.secret)


def open_key(path: Path, *, may_create: bool) -> ClientKey:
    """The key in ``path``, or a fresh one. Raises PrivacyError when it is missing and must not be made anew."""
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
    return ClientKey(secret)


def identity_of(state: Path) -> str:
    """The state folder's own random name: it names the key file, and parts federations that share one."""
    path = state / "key-id"
    if not path.exists():
        write_file(path, secrets.token_hex(16).encode())
    with storage_errors(path):
        return path.read_text().strip()


def default_key(identity: str) -> Path:
    """Where a client's key lies unless --key says otherwise: in the user's configuration."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return home / "splitfl" / "keys" / f"{identity}.key"
