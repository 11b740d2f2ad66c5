"""A client's identity: what it says to whom, in which order, and what it finds again after being cut off."""

from __future__ import annotations

import hashlib
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client_model.identity import obtain, tls_error
from server_model.authority import Authority, open_authority
from splitfl.channel.certificates import certificate_pem, requested_key
from splitfl.channel.joining import JoinString
from splitfl.errors import ConfigError, LinkError, ProtocolError, SplitFLError, StorageError, TrustError
from splitfl.wire.messages import AskAuthority, Enrol, Enrolled, Farewell, Message
from splitfl.wire.messages import Authority as Shown

TOKEN = "tHe-secret_token-0123456789-tHe-secret_toke"


class Server:
    """What the other side is asked, in order, and whether TLS would have verified it; answers as told."""

    def __init__(self, authority: Authority, shown: str | None = None) -> None:
        self.authority = authority
        self.shown = shown or authority.pem
        self.asked: list[Message] = []
        self.verified: list[bool] = []
        self.lose_answers = 0
        self.now = datetime.now(UTC)

    def __call__(self, url: str, message: Message, tls: ssl.SSLContext) -> Message:
        assert url == "wss://127.0.0.1:7000"
        self.asked.append(message)
        self.verified.append(tls.verify_mode == ssl.CERT_REQUIRED and tls.check_hostname)
        if isinstance(message, AskAuthority):
            return Shown(self.shown)
        assert isinstance(message, Enrol)
        certificate = self.authority.sign_client(requested_key(message.request), message.name, self.now)
        if self.lose_answers:
            self.lose_answers -= 1
            raise LinkError("gone")
        return Enrolled(certificate_pem(certificate))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(open_authority(tmp_path / "server"))


def join_string(server: Server, token: str = TOKEN, name: str = "ward-a") -> JoinString:
    return JoinString("127.0.0.1", 7000, name, server.authority.fingerprint, token)


def folder_of(state: Path, token: str = TOKEN) -> Path:
    return state / "identity" / hashlib.sha256(token.encode()).hexdigest()[:16]


def test_token_is_sent_to_a_verified_server_alone(server: Server, tmp_path: Path) -> None:
    context = obtain(join_string(server), tmp_path, server)
    asked = [(type(message), verified) for message, verified in zip(server.asked, server.verified, strict=True)]
    assert asked == [(AskAuthority, False), (Enrol, True)]
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3


def test_second_start_asks_nothing(server: Server, tmp_path: Path) -> None:
    obtain(join_string(server), tmp_path, server)
    server.asked.clear()
    obtain(join_string(server), tmp_path, server)
    obtain(join_string(server, token=""), tmp_path, server)
    assert not server.asked


def test_private_key_is_the_owners_alone_and_stays(server: Server, tmp_path: Path) -> None:
    obtain(join_string(server), tmp_path, server)
    key = folder_of(tmp_path) / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" not in str(server.asked)


def test_client_that_is_cut_off_asks_again_with_the_same_key(server: Server, tmp_path: Path) -> None:
    server.lose_answers = 1
    with pytest.raises(LinkError):
        obtain(join_string(server), tmp_path, server)
    obtain(join_string(server), tmp_path, server)
    first, second = (m for m in server.asked if isinstance(m, Enrol))
    assert requested_key(first.request) == requested_key(second.request)


def test_new_invitation_makes_a_new_key(server: Server, tmp_path: Path) -> None:
    obtain(join_string(server), tmp_path, server)
    obtain(join_string(server, token="another-token-987654"), tmp_path, server)
    first, second = (m for m in server.asked if isinstance(m, Enrol))
    assert requested_key(first.request) != requested_key(second.request)


def test_wrong_authority_is_told_nothing(server: Server, tmp_path: Path) -> None:
    other = Server(open_authority(tmp_path / "other"))
    with pytest.raises(TrustError, match="is not the one"):
        obtain(join_string(server), tmp_path, other)
    assert [type(message) for message in other.asked] == [AskAuthority]
    assert not (folder_of(tmp_path) / "ca.pem").exists()


@pytest.mark.parametrize("shown", ["-----BEGIN X-----\nYWJj\n-----END X-----\n", "-----BEGIN CERTIFICATE-----\nYQ==\n"])
def test_junk_instead_of_an_authority_is_told_nothing(server: Server, tmp_path: Path, shown: str) -> None:
    server.shown = shown
    with pytest.raises(TrustError, match="unreadable"):
        obtain(join_string(server), tmp_path, server)
    assert [type(message) for message in server.asked] == [AskAuthority]


def test_stored_authority_is_compared_every_time(server: Server, tmp_path: Path) -> None:
    obtain(join_string(server), tmp_path, server)
    (folder_of(tmp_path) / "ca.pem").write_text(open_authority(tmp_path / "other").pem)
    with pytest.raises(TrustError, match="is not the one"):
        obtain(join_string(server), tmp_path, server)


def test_certificate_that_has_ended_says_so(server: Server, tmp_path: Path) -> None:
    server.now -= timedelta(days=366)
    with pytest.raises(TrustError, match=r"ended on .*splitfl invite"):
        obtain(join_string(server), tmp_path, server)


def test_join_string_without_a_token_needs_a_certificate(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token"):
        obtain(join_string(server, token=""), tmp_path, server)
    assert not server.asked


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "ca.pem"])
def test_damaged_identity_is_named(server: Server, tmp_path: Path, name: str) -> None:
    obtain(join_string(server), tmp_path, server)
    (folder_of(tmp_path) / name).write_text("junk")
    with pytest.raises(SplitFLError) as caught:
        obtain(join_string(server), tmp_path, server)
    assert isinstance(caught.value, StorageError | TrustError)


def test_answer_of_another_kind_breaks_the_protocol(server: Server, tmp_path: Path) -> None:
    def confused(_url: str, _message: Message, _tls: ssl.SSLContext) -> Message:
        return Farewell(0)

    with pytest.raises(ProtocolError, match="Farewell"):
        obtain(join_string(server), tmp_path, confused)


def alert(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: alert("TLSV1_ALERT_UNKNOWN_CA"), "does not know the authority"),
        (lambda: alert("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "has ended"),
        (lambda: ssl.SSLCertVerificationError("self-signed"), "no certificate of the expected authority"),
    ],
)
def test_tls_failure_that_waiting_does_not_mend_is_told(make: Callable[[], ssl.SSLError], said: str) -> None:
    error = make()
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_message = "self-signed certificate"
    found = tls_error(error, "wss://x:1")
    assert found is not None
    assert said in found.message


@pytest.mark.parametrize("error", [OSError("refused"), alert("WRONG_VERSION_NUMBER"), None])
def test_other_failures_may_pass(error: BaseException | None) -> None:
    assert tls_error(error, "wss://x:1") is None
