"""Who this client is on TLS: the authority that it trusts, a private key that never leaves, a certificate for it.

    STATE/identity/TOKEN-HASH/ca.pem            the federation's authority, compared with the join string's fingerprint
    STATE/identity/TOKEN-HASH/key.pem           the private key, 0600
    STATE/identity/TOKEN-HASH/certificate.pem   what the server gave for token and key

One folder an invitation. The key is on disk before the token is sent, so a client that is cut off in the middle asks
again with the same key, and gets the same certificate. On first contact the server is a stranger: it is asked for its
authority and told nothing. The token is sent only when that has the right fingerprint, and then on a second
connection, to a server with a certificate of that authority.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from splitfl.channel.certificates import fingerprint, key_pem, new_key, read_key, signing_request
from splitfl.channel.joining import JoinString
from splitfl.console import note
from splitfl.errors import ConfigError, ProtocolError, StorageError, TrustError
from splitfl.files import storage_errors, write_file
from splitfl.wire.messages import AskAuthority, Authority, Enrol, Enrolled, Message

#: ask one thing on a connection of its own: address, message, TLS settings -> the answer
Ask = Callable[[str, Message, ssl.SSLContext], Message]

NEW_INVITATION = (
    "Ask the server's operator for a new join string (splitfl invite); with the same --state the client goes on."
)


@dataclass(frozen=True)
class Identity:
    """The files of one invitation in ``folder``."""

    folder: Path
    join: JoinString

    @property
    def enrolled(self) -> bool:
        return (self.folder / "certificate.pem").exists()

    def trust(self) -> ssl.SSLContext:
        """TLS 1.3 with a server whose certificate the pinned authority signed. Raises TrustError, StorageError."""
        pem = self._read("ca.pem")
        check_fingerprint(pem, self.join)
        context = client_context()
        context.load_verify_locations(cadata=pem)
        return context

    def context(self) -> ssl.SSLContext:
        """``trust``, and the client's own certificate. Raises TrustError, StorageError."""
        context = self.trust()
        check_certificate(self._read("certificate.pem"), self._read("ca.pem"), self.join.name)
        with storage_errors(self.folder):
            context.load_cert_chain(self.folder / "certificate.pem", self.folder / "key.pem")
        return context

    def meet(self, ask: Ask) -> None:
        """Learn the authority from a server that is not trusted yet. Raises TrustError."""
        answer = ask(self.join.url, AskAuthority(), stranger_context())
        if not isinstance(answer, Authority):
            raise unexpected(answer)
        check_fingerprint(answer.certificate, self.join)
        write_file(self.folder / "ca.pem", answer.certificate.encode())

    def enrol(self, ask: Ask) -> None:
        """Trade the token for a certificate. Raises RefusedError, TrustError, StorageError."""
        key_file = self.folder / "key.pem"
        if not key_file.exists():
            write_file(key_file, key_pem(new_key()))
        request = signing_request(read_key(self._read("key.pem").encode()), self.join.name)
        answer = ask(self.join.url, Enrol(self.join.name, self.join.token, request), self.trust())
        if not isinstance(answer, Enrolled):
            raise unexpected(answer)
        write_file(self.folder / "certificate.pem", answer.certificate.encode())

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self.folder / name}: {error}", NEW_INVITATION) from error


def obtain(join: JoinString, state: Path, ask: Ask) -> ssl.SSLContext:
    """The TLS settings to join with; enrols on first contact.

    Raises ConfigError, TrustError, RefusedError, StorageError, and whatever ``ask`` raises.
    """
    identity = find(join, state / "identity")
    if not identity.enrolled:
        if not (identity.folder / "ca.pem").exists():
            identity.meet(ask)
        identity.enrol(ask)
    try:
        return identity.context()
    except (ssl.SSLError, ValueError) as error:
        raise StorageError(f"{identity.folder} holds no key with its certificate: {error}", NEW_INVITATION) from error


def find(join: JoinString, folder: Path) -> Identity:
    """The identity of the join string's token; without a token, the last one that enrolled as this client here."""
    if join.token:
        return Identity(folder / hashlib.sha256(join.token.encode()).hexdigest()[:16], join)
    enrolled = sorted(folder.glob("*/certificate.pem"), key=lambda path: path.stat().st_mtime)
    if not enrolled:
        raise ConfigError(
            "this join string has no token, and the state folder no certificate", "Copy the whole join string."
        )
    return Identity(enrolled[-1].parent, join)


def client_context() -> ssl.SSLContext:
    """TLS 1.3; the server's certificate must be good, and made out to the one fixed name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    return context


def stranger_context() -> ssl.SSLContext:
    """TLS with whoever answers, for what may be said to anybody."""
    context = client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_fingerprint(pem: str, join: JoinString) -> None:
    """Raise TrustError unless this is the authority that the join string names."""
    try:
        found = fingerprint(x509.load_pem_x509_certificate(pem.encode()))
    except ValueError:
        found = "unreadable"
    if found != join.authority:
        raise TrustError(
            f"the server at {join.netloc} is not the one that this join string is for: its authority is "
            f"{found}, expected {join.authority}",
            "Nothing was sent. Check the address; ask the operator, by another way, whether the fingerprint is right.",
        )


def check_certificate(pem: str, authority: str, name: str) -> None:
    """Raise TrustError unless the server will take this certificate: it would hang up without a reason."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError(
            f"the certificate of {name!r} is of another authority than the join string's", NEW_INVITATION
        ) from None
    end = certificate.not_valid_after_utc
    if end < datetime.now(UTC):
        raise TrustError(f"the certificate of {name!r} ended on {end:%F}", NEW_INVITATION)


def tls_error(error: BaseException | None, url: str) -> TrustError | None:
    """What a failure of TLS means for the person at the client; None when trying again may help."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(
            f"the server at {url} has no certificate of the expected authority ({error.verify_message})",
            "Check the address and this machine's clock; if both are right, somebody may be in between: ask the "
            "operator by another way.",
        )
    alert = getattr(error, "reason", None) or ""
    if "UNKNOWN_CA" in alert or "BAD_CERTIFICATE" in alert or "DECRYPT_ERROR" in alert:
        return TrustError("the server does not know the authority of this client's certificate", NEW_INVITATION)
    if "CERTIFICATE_EXPIRED" in alert:
        return TrustError("this client's certificate has ended", NEW_INVITATION)
    return None


def unexpected(answer: Message) -> ProtocolError:
    return ProtocolError(
        f"the server answered {type(answer).__name__} to an enrolment",
        "Install the same SplitFL release on both sides.",
    )


def enrolled(join: JoinString, state: Path, patience: float) -> ssl.SSLContext:
    """The TLS settings to join with, asked of the server by its own websocket. Raises SplitFLError."""
    from client_model.link import ask_once

    return obtain(join, state, partial(ask_once, patience_s=patience, say=note))
