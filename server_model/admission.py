"""Who may speak: the service asks here what a peer has shown, enrols newcomers, and hears of revocations.

On TLS the name of a client is the one in its certificate, checked against the books on every connection. On a plain
socket, where such are allowed, nobody proves anything; names that have been invited are not to be had there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_model.authority import Authority, has_authority, now_utc, open_authority
from server_model.registry import Issued, Registry, ended
from splitfl.channel.certificates import certificate_pem, public_key_hash, requested_key
from splitfl.console import is_loopback
from splitfl.errors import RefusedError
from splitfl.wire import messages
from splitfl.wire.messages import AskAuthority, Enrol, Enrolled, Hello


@dataclass(frozen=True)
class Peer:
    """What a connection has shown: if it is encrypted, its verified certificate's serial number, if it is local."""

    encrypted: bool
    serial: str = ""
    loopback: bool = False

    @classmethod
    def of(cls, transport: Any) -> Peer:
        """The peer of an asyncio transport; OpenSSL has verified the certificate, if there is one."""
        certificate = transport.get_extra_info("peercert") or {}
        encrypted = transport.get_extra_info("ssl_object") is not None
        address, *_ = transport.get_extra_info("peername") or ("",)  # none of one that has gone already
        return cls(encrypted, certificate.get("serialNumber", "").lower(), is_loopback(address))


class Admission:
    """Authority and books of one state folder. ``plain`` allows sockets without TLS; ``new``: both were just made."""

    def __init__(self, authority: Authority, registry: Registry, *, plain: bool, new: bool = False) -> None:
        self.authority = authority
        self.registry = registry
        self.plain = plain
        self.new = new

    @classmethod
    def open(cls, state: Path, *, plain: bool) -> Admission:
        """Raises StorageError."""
        new = not has_authority(state)
        authority = open_authority(state)
        return cls(authority, Registry(authority.folder / "clients.sqlite"), plain=plain, new=new)

    async def answer(self, peer: Peer, message: AskAuthority | Enrol) -> messages.Authority | Enrolled:
        """What a newcomer gets. Raises RefusedError, StorageError."""
        if isinstance(message, AskAuthority):
            return messages.Authority(self.authority.pem)
        if not peer.encrypted:
            raise unencrypted()
        return Enrolled(await asyncio.to_thread(self._enrol, message))

    def _enrol(self, message: Enrol) -> str:
        key = requested_key(message.request)

        def issue() -> Issued:
            certificate = self.authority.sign_client(key, message.name, now_utc())
            end = certificate.not_valid_after_utc.timestamp()
            return Issued(serial_text(certificate.serial_number), end, certificate_pem(certificate))

        return self.registry.enrol(message.name, message.token, public_key_hash(key), issue)

    async def admit(self, peer: Peer, hello: Hello) -> None:
        """Check that the peer may be the client that it says it is. Raises RefusedError, StorageError."""
        await asyncio.to_thread(self._admit, peer, hello.name)

    def _admit(self, peer: Peer, name: str) -> None:
        if not peer.encrypted and not self.plain:
            raise unencrypted()
        if peer.serial:
            self.registry.admit(peer.serial, name)
        elif peer.encrypted or self.registry.knows(name):
            raise RefusedError(
                f"to be {name!r} takes a certificate",
                "Join with the join string that the server's operator has made for you (splitfl invite).",
                code="certificate_missing",
            )

    async def ended(self) -> dict[str, RefusedError]:
        """Serial numbers of certificates that are no longer good, each with what to tell its holder."""
        books = await asyncio.to_thread(self.registry.ended)
        return {serial: ended(why) for serial, why in books.items()}


def serial_text(number: int) -> str:
    """A serial number as OpenSSL writes it, in lower case: whole bytes of hexadecimal."""
    text = f"{number:x}"
    return text.zfill(len(text) + len(text) % 2)


def unencrypted() -> RefusedError:
    return RefusedError(
        "this server takes encrypted connections only",
        "Join with the join string that the server's operator has made for you (splitfl invite).",
        code="unencrypted",
    )
