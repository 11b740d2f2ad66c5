"""Inviting a client: a join string out of the state folder, while the service runs or not."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from server_model.authority import open_authority
from server_model.registry import Registry
from splitfl.channel.joining import JoinString
from splitfl.console import parse_address
from splitfl.errors import ConfigError
from splitfl.files import keep_file, storage_errors
from splitfl.wire.messages import CLIENT_NAME


def invite(state: Path, name: str, *, address: str = "", valid_s: float) -> JoinString:
    """A new invitation for ``name``; ``address`` is what clients dial, "" takes where the service last listened.

    Raises ConfigError, StorageError.
    """
    check_state(state)
    if not re.fullmatch(CLIENT_NAME, name):
        raise ConfigError(
            f"{name!r} is no client name", "Use letters, digits, dots, dashes and underscores, 64 at most."
        )
    if not 0 < valid_s < float("inf"):
        raise ConfigError(f"an invitation cannot be valid for {valid_s / 3600:g} hours", "Give --valid-hours above 0.")
    host, port = parse_address(address or remembered_address(state))
    if port == 0:
        raise ConfigError(f"nobody can dial {address}", "Give the port in --address HOST:PORT.")
    authority = open_authority(state)
    token = open_registry(state).invite(name, valid_s)
    return JoinString(host, port, name, authority.fingerprint, token)


def open_registry(state: Path) -> Registry:
    """The books of a state folder. Raises ConfigError, StorageError."""
    check_state(state)
    folder = state / "tls"
    if not (folder / "ca.pem").exists():
        raise ConfigError(f"{state} has no clients yet", "Start `splitfl serve` with it, or invite one.")
    return Registry(folder / "clients.sqlite")


def check_state(state: Path) -> None:
    if not state.is_dir():
        raise ConfigError(f"there is no folder {state}", "Name the --state of `splitfl serve`.")


def remember_address(state: Path, host: str, port: int) -> None:
    """Note where the service listens, for later invitations. Raises StorageError."""
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    keep_file(state / "tls" / "address", f"{text}\n".encode())


def remembered_address(state: Path) -> str:
    """Where the service last listened, as HOST:PORT. Raises ConfigError when nobody can dial that."""
    path = state / "tls" / "address"
    if not path.exists():
        raise ConfigError(
            f"{state} does not know the server's address yet",
            "Start `splitfl serve` once, or say what clients dial with --address HOST:PORT.",
        )
    with storage_errors(path):
        address = path.read_text().strip()
    if is_unspecified(parse_address(address)[0]):
        raise ConfigError(
            f"the service listens on {address}, which is every address of its machine and none to dial",
            "Say what clients dial with --address HOST:PORT.",
        )
    return address


def is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
