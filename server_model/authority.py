"""The server's certificate authority: made on the first start, it vouches for the server and for each client.

    STATE/tls/ca.pem        the authority's certificate, ten years
    STATE/tls/ca.key        its private key: whoever has it can pose as the server and as any client
    STATE/tls/server.pem    key and certificate of the server, renewed at a start when a year or less is left

Files are 0600 in a folder that is 0700, whole or not there. Clients know the authority by its fingerprint.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from splitfl.channel.certificates import (
    SERVER_NAME,
    certificate_pem,
    common_name,
    fingerprint,
    key_pem,
    new_key,
    read_key,
)
from splitfl.errors import StorageError
from splitfl.files import appending_alone, new_folder, storage_errors, write_file

YEAR = timedelta(days=365)
AUTHORITY_LIFE = 10 * YEAR
SERVER_LIFE = 2 * YEAR
SERVER_RENEWAL = YEAR  # renewed at a start when no more than this is left, so that no run outlives it soon
CLIENT_LIFE = YEAR
BACKDATED = timedelta(days=1)  # for clients whose clocks are late


def now_utc() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Authority:
    """Signs certificates. ``folder`` is STATE/tls."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)

    @property
    def pem(self) -> str:
        return certificate_pem(self.certificate)

    def sign_client(self, public_key: ec.EllipticCurvePublicKey, name: str, now: datetime) -> x509.Certificate:
        """A certificate that lets the holder of the key connect as ``name`` for a year."""
        builder = self._leaf(public_key, name, now, CLIENT_LIFE, ExtendedKeyUsageOID.CLIENT_AUTH)
        return builder.sign(self.key, hashes.SHA256())

    def sign_server(self, public_key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        builder = self._leaf(public_key, SERVER_NAME, now, SERVER_LIFE, ExtendedKeyUsageOID.SERVER_AUTH)
        names = x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])
        return builder.add_extension(names, critical=False).sign(self.key, hashes.SHA256())

    def _leaf(
        self,
        public_key: ec.EllipticCurvePublicKey,
        name: str,
        now: datetime,
        life: timedelta,
        usage: x509.ObjectIdentifier,
    ) -> x509.CertificateBuilder:
        """What certificates of servers and clients have in common; they never outlive the authority."""
        end = min(now + life, self.certificate.not_valid_after_utc)
        builder = certificate_of(public_key, name, now, end).issuer_name(self.certificate.subject)
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )

    def renew_server(self, now: datetime) -> None:
        """Make the server's certificate if there is none, or anew when it is near its end. Raises StorageError."""
        path = self.folder / "server.pem"
        if path.exists() and self._good_until(path) - now > SERVER_RENEWAL:
            return
        key = new_key()
        write_file(path, key_pem(key) + certificate_pem(self.sign_server(key.public_key(), now)).encode())

    def _good_until(self, path: Path) -> datetime:
        try:
            return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        except (OSError, ValueError):
            return datetime.min.replace(tzinfo=UTC)  # unreadable: made anew, for nothing depends on that very one

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 alone. Clients may show a certificate (to enrol they have none); what they show is verified.

        No session tickets: each connection proves its certificate anew. Raises StorageError.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0
        context.load_verify_locations(cadata=self.pem)
        try:
            context.load_cert_chain(self.folder / "server.pem")
        except (OSError, ssl.SSLError) as error:
            raise damaged(self.folder / "server.pem", error) from error
        return context


def has_authority(state: Path) -> bool:
    """Whether the authority of a state folder was made before."""
    return (state / "tls" / "ca.pem").exists()


def open_authority(state: Path, now: datetime | None = None) -> Authority:
    """The authority of a state folder; made when there is none. Raises StorageError."""
    now = now or now_utc()
    folder = state / "tls"
    with storage_errors(folder):
        state.mkdir(parents=True, exist_ok=True)
        with appending_alone(state / ".tls.lock"):  # serve and invite may both be the first
            if not has_authority(state):
                make_authority(folder, now)
            authority = read_authority(folder)
            if now > authority.certificate.not_valid_after_utc:
                raise StorageError(
                    f"the certificate authority in {folder} ended on {authority.certificate.not_valid_after_utc:%F}",
                    "Move that folder away, start again, and invite every client anew.",
                )
            authority.renew_server(now)
    return authority


def make_authority(folder: Path, now: datetime) -> None:
    """A new key and its self-signed certificate, both there or neither."""
    key = new_key()
    name = "SplitFL federation"
    certificate = (
        certificate_of(key.public_key(), name, now, now + AUTHORITY_LIFE)
        .issuer_name(common_name(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    with new_folder(folder) as work:
        write_file(work / "ca.key", key_pem(key))
        write_file(work / "ca.pem", certificate_pem(certificate).encode())


def read_authority(folder: Path) -> Authority:
    try:
        key = read_key((folder / "ca.key").read_bytes())
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, error) from error
    if certificate.public_key() != key.public_key():
        raise damaged(folder, ValueError("ca.key is not the key of ca.pem"))
    return Authority(folder, key, certificate)


def damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be read: {error}",
        "Put the folder back from a backup; without one move it away, start again, and invite every client anew.",
    )


def certificate_of(
    public_key: ec.EllipticCurvePublicKey, name: str, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    """Subject, key, serial number and time of a certificate."""
    return (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
