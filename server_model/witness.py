"""What the server remembers of each client's ledger: head and count, signed for the client and durable here first.

Who proved a name with a certificate has a note of its own: a stranger on a plain socket cannot spoil it.
"""

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
    """Marks of all clients in ``folder``, and the key that signs them. Raises StorageError.

    ``strict``: a ledger that went back is refused. Without privacy there is no budget to reset, so it is written down
    as it is. ``known``: clients have been here before, so their key must be there.
    """

    def __init__(self, folder: Path, *, strict: bool = True, known: bool = False) -> None:
        self.folder = folder
        self.strict = strict
        self._writing = threading.Lock()
        self._key = self._open_key(folder / "signing.key", may_create=not (strict and known))

    def _open_key(self, path: Path, *, may_create: bool) -> Ed25519PrivateKey:
        if not path.exists():
            if not may_create:
                raise StorageError(
                    f"{path} is gone: with another key no private client would go on",
                    "Put STATE/ledgers back from a backup; without one, begin a new federation in a new --state.",
                )
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

    def last(self, client: str, *, proven: bool) -> Mark:
        """What was countersigned last for this client. Raises StorageError for a damaged note."""
        path = self._note(client, proven)
        if not path.exists():
            return NOTHING
        try:
            return Mark(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read", "Put it back from a copy of the state folder.") from error

    def _note(self, client: str, proven: bool) -> Path:
        return self.folder / (f"{client}.json" if proven else f"{client}~plain.json")  # no name has a tilde

    def countersign(self, client: str, mark: Mark, *, proven: bool) -> str:
        """Write down a ledger's state and sign it. Raises RefusedError for one that went back."""
        with self._writing:
            last = self.last(client, proven=proven)
            went_back = mark.count < last.count or (mark.count == last.count and mark.head != last.head)
            if self.strict and went_back:
                raise RefusedError(
                    f"a ledger of {mark.count} rows, where {last.count} others were countersigned",
                    "Put back the newest copy of this client's state folder.",
                    code="ledger",
                )
            if mark != last:
                content = {"count": mark.count, "head": mark.head}
                write_file(self._note(client, proven), json.dumps(content).encode())
        return sign(self._key, client, mark)
