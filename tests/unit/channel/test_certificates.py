"""Signing requests of strangers: a P-256 key that proves itself, and nothing else."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from splitfl.channel.certificates import (
    common_name,
    key_pem,
    new_key,
    public_key_hash,
    read_key,
    requested_key,
    signing_request,
)
from splitfl.errors import RefusedError


def test_request_carries_the_public_key_and_key_files_are_read_back() -> None:
    key = new_key()
    found = requested_key(signing_request(read_key(key_pem(key)), "ward-a"))
    assert public_key_hash(found) == public_key_hash(key.public_key())
    assert public_key_hash(found) != public_key_hash(new_key().public_key())


def other_request(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name("x")).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def forged_request() -> str:
    """A request whose last signature byte is another one."""
    request = x509.load_pem_x509_csr(signing_request(new_key(), "x").encode())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der))
    return forged.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    "pem",
    [
        "-----BEGIN X-----\nYWJj\n-----END X-----\n",
        "-----BEGIN CERTIFICATE REQUEST-----\nYWJj\n-----END CERTIFICATE REQUEST-----\n",
        other_request(rsa.generate_private_key(65537, 2048)),
        other_request(ec.generate_private_key(ec.SECP384R1())),
        forged_request(),
    ],
    ids=["no request", "junk", "rsa", "another curve", "forged"],
)
def test_request_that_is_anything_else_is_refused(pem: str) -> None:
    with pytest.raises(RefusedError) as caught:
        requested_key(pem)
    assert caught.value.code == "bad_request"
