"""The certificate authority of a state folder: made once, whole or not there; what it signs is good for one thing."""

from __future__ import annotations

import multiprocessing
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from client_model.identity import client_context
from server_model.authority import AUTHORITY_LIFE, SERVER_LIFE, YEAR, Authority, open_authority
from splitfl.channel.certificates import certificate_pem, key_pem, new_key
from splitfl.errors import StorageError

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> dict[str, object]:
    """TLS in memory; returns what the server knows of the client's certificate. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[1].version() == "TLSv1.3"
    return dict(ends[1].getpeercert() or {})


def trusting(authority: Authority) -> ssl.SSLContext:
    context = client_context()
    context.load_verify_locations(cadata=authority.pem)
    return context


def with_certificate(context: ssl.SSLContext, folder: Path, certificate: x509.Certificate, key: bytes) -> None:
    (folder / "chain.pem").write_bytes(key + certificate_pem(certificate).encode())
    context.load_cert_chain(folder / "chain.pem")


SERVER = "trunk.splitfl.invalid"


def test_folder_keeps_its_authority(tmp_path: Path) -> None:
    first, second = open_authority(tmp_path), open_authority(tmp_path)
    assert first.fingerprint == second.fingerprint
    assert open_authority(tmp_path / "other").fingerprint != first.fingerprint


def test_private_keys_are_for_the_owner_alone(tmp_path: Path) -> None:
    folder = open_authority(tmp_path).folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("ca.key", "server.pem"):
        assert b"PRIVATE KEY" in (folder / name).read_bytes()
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def fingerprint_of(folder: Path) -> str:
    return open_authority(folder).fingerprint


def test_two_first_starts_at_once_make_one_authority(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(fingerprint_of, [tmp_path] * 4))) == 1


def test_client_and_server_know_each_other(tmp_path: Path) -> None:
    authority, key = open_authority(tmp_path), new_key()
    certificate = authority.sign_client(key.public_key(), "ward-a", datetime.now(UTC))
    client = trusting(authority)
    with_certificate(client, tmp_path, certificate, key_pem(key))
    seen = handshake(authority.server_context(), client, SERVER)
    assert seen["subject"] == ((("commonName", "ward-a"),),)
    assert int(str(seen["serialNumber"]), 16) == certificate.serial_number


def test_newcomer_needs_no_certificate(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    assert handshake(authority.server_context(), trusting(authority), SERVER) == {}


def test_server_of_another_authority_is_not_trusted(tmp_path: Path) -> None:
    authority, other = open_authority(tmp_path / "a"), open_authority(tmp_path / "b")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(other.server_context(), trusting(authority), SERVER)


def test_client_of_another_authority_is_not_taken(tmp_path: Path) -> None:
    authority, other, key = open_authority(tmp_path / "a"), open_authority(tmp_path / "b"), new_key()
    client = trusting(authority)
    with_certificate(client, tmp_path, other.sign_client(key.public_key(), "w", datetime.now(UTC)), key_pem(key))
    with pytest.raises(ssl.SSLError):
        handshake(authority.server_context(), client, SERVER)


def test_client_cannot_play_the_server_whatever_its_name(tmp_path: Path) -> None:
    authority, key = open_authority(tmp_path), new_key()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = authority.sign_client(key.public_key(), SERVER, datetime.now(UTC))
    with_certificate(server, tmp_path, certificate, key_pem(key))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, trusting(authority), SERVER)


def test_server_cannot_play_a_client(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    client = trusting(authority)
    client.load_cert_chain(authority.folder / "server.pem")
    with pytest.raises(ssl.SSLError):
        handshake(authority.server_context(), client, SERVER)


def test_older_tls_is_refused(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    client = trusting(authority)
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(authority.server_context(), client, SERVER)


def test_client_certificate_lasts_a_year_and_no_longer_than_its_authority(tmp_path: Path) -> None:
    authority, key = open_authority(tmp_path, NOW), new_key().public_key()
    assert authority.sign_client(key, "w", NOW).not_valid_after_utc == NOW + YEAR
    late = NOW + AUTHORITY_LIFE - timedelta(days=3)
    assert authority.sign_client(key, "w", late).not_valid_after_utc == authority.certificate.not_valid_after_utc


def server_end(folder: Path) -> datetime:
    return x509.load_pem_x509_certificate((folder / "tls" / "server.pem").read_bytes()).not_valid_after_utc


def test_server_certificate_is_renewed_at_a_start_near_its_end_and_the_authority_stays(tmp_path: Path) -> None:
    first = open_authority(tmp_path, NOW)
    open_authority(tmp_path, NOW + timedelta(days=300))
    assert server_end(tmp_path) == NOW + SERVER_LIFE
    later = NOW + timedelta(days=400)
    assert open_authority(tmp_path, later).fingerprint == first.fingerprint
    assert server_end(tmp_path) == later + SERVER_LIFE


def test_server_certificate_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    (authority.folder / "server.pem").write_text("junk")
    assert handshake(open_authority(tmp_path).server_context(), trusting(authority), SERVER) == {}


def test_authority_at_its_end_says_so(tmp_path: Path) -> None:
    open_authority(tmp_path, NOW)
    with pytest.raises(StorageError, match="ended on"):
        open_authority(tmp_path, NOW + AUTHORITY_LIFE + timedelta(days=1))


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
def test_authority_that_is_damaged_is_not_replaced_silently(tmp_path: Path, name: str) -> None:
    folder = open_authority(tmp_path).folder
    (folder / name).write_text("junk")
    with pytest.raises(StorageError, match="backup"):
        open_authority(tmp_path)
    assert (folder / name).read_text() == "junk"


def test_key_of_another_authority_is_noticed(tmp_path: Path) -> None:
    folder = open_authority(tmp_path).folder
    (folder / "ca.key").write_bytes(key_pem(new_key()))
    with pytest.raises(StorageError, match="not the key"):
        open_authority(tmp_path)
