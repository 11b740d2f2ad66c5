"""What the server remembers of each client's ledger: head and count, signed for the client and durable here first."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from splitfl.errors import RefusedError, StorageError
from splitfl.files import write_file
from splitfl.privacy.ledger import GENESIS
from splitfl.privacy.witness import Mark, sign

NOTHING = Mark(0, GENESIS.hex())


class Witness:
    """Marks of all clients in ``folder``, and the key that signs them. Raises StorageError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing = threading.Lock()
        self._key = self._open_key(folder / "signing.key")

    def _open_key(self, path: Path) -> Ed25519PrivateKey:
        if not path.exists():
            write_file(path, Ed25519PrivateKey.generate().private_bytes_raw())
        try:
            path.chmod(0o600)
            return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} is no signing key", "Put it back from a copy of the state folder.") from error

    @property
    def signer(self) -> str:
        """The public key, in hex."""
        return self._key.public_key().public_bytes_raw().hex()

    def last(self, client: str) -> Mark:
        """What was countersigned last for this client. Raises StorageError for a damaged note."""
        path = self.folder / f"{client}.json"
        if not path.exists():
            return NOTHING
        try:
            return Mark(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read", "Put it back from a copy of the state folder.") from error

    def countersign(self, client: str, mark: Mark) -> str:
        """Write down a ledger's state and sign it. Raises RefusedError for one that went back."""
        with self._writing:
            last = self.last(client)
            if mark.count < last.count or (mark.count == last.count and mark.head != last.head):
                raise RefusedError(
                    f"a ledger of {mark.count} rows, where {last.count} others were countersigned",
                    "Put back the newest copy of this client's state folder.",
                    code="ledger",
                )
            if mark != last:
                write_file(
                    self.folder / f"{client}.json", json.dumps({"count": mark.count, "head": mark.head}).encode()
                )
        return sign(self._key, client, mark)
