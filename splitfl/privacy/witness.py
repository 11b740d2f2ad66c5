"""The server's countersignature of a client's ledger: head and count, by Ed25519.

A client that comes back with an older or another ledger is stopped, for its budget would begin anew. The server
learns a number and a hash. What it cannot show: a ledger deleted by somebody who then joins under a new name.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from splitfl.errors import PrivacyError, ProtocolError
from splitfl.privacy.ledger import Ledger


@dataclass(frozen=True)
class Mark:
    """The state of a ledger: number of rows, and the chain's value after them as 64 hex digits."""

    count: int
    head: str

    def signed_bytes(self, client: str) -> bytes:
        """What is signed for this client."""
        return b"splitfl ledger\0" + f"{client}\0{self.count}\0{self.head}".encode()


def sign(key: Ed25519PrivateKey, client: str, mark: Mark) -> str:
    """The countersignature, in hex."""
    return key.sign(mark.signed_bytes(client)).hex()


def check_signature(signer: str, client: str, mark: Mark, signature: str) -> None:
    """Raise ProtocolError unless the holder of the public key ``signer`` (hex) signed ``mark``."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer))
        key.verify(bytes.fromhex(signature), mark.signed_bytes(client))
    except (ValueError, InvalidSignature):
        raise ProtocolError("the server's countersignature is not one", "Do not trust this server.") from None


def check_not_older(ledger: Ledger, mark: Mark) -> None:
    """Raise PrivacyError when the ledger lacks rows that the server has countersigned."""
    if not ledger.has_prefix(mark.count, bytes.fromhex(mark.head)):
        raise PrivacyError(
            f"this client's ledger ({ledger.count} rows) is not the one that the server countersigned ({mark.count})",
            "Put back the newest copy of the state folder: an older one would spend the same budget twice.",
        )
