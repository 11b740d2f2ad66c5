"""What both ends of the channel know of X.509: keys, signing requests, fingerprints, and the server's fixed name.

The server's certificate is made out to one fixed name, whatever host and port it is reached at: clients trust it
because their own federation's authority signed it, and that authority's fingerprint came with their invitation. So
NAT, tunnels and changing addresses need no new certificate. Keys are P-256, which TLS 1.3 requires of everybody
(RFC 8446, section 9.1).
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from splitfl.errors import RefusedError

SERVER_NAME = "trunk.splitfl.invalid"  # no host on any network has it (RFC 2606)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh private key from the system's entropy."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8; whoever stores it sets the mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The key of ``key_pem``. Raises ValueError."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    return key


def certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the whole certificate (DER), in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """A PKCS#10 request in PEM: "certify this public key for ``name``"; its signature proves that the key is ours."""
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii")


def requested_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request that proves itself. Raises RefusedError: no stranger's request is trusted."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        valid = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        if valid and request.is_signature_valid:
            assert isinstance(key, ec.EllipticCurvePublicKey)
            return key
    except Exception as error:
        raise bad_request() from error
    raise bad_request()


def bad_request() -> RefusedError:
    return RefusedError(
        "the signing request is not a P-256 key with a valid signature",
        "Join with the same SplitFL release as the server's.",
        code="bad_request",
    )


def public_key_hash(key: ec.EllipticCurvePublicKey) -> str:
    """What tells one key from another: SHA-256 of its SubjectPublicKeyInfo."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()
