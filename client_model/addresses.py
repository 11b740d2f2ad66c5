"""Where to go and who to be, as it was typed: a join string, or a plain address and a name."""

from __future__ import annotations

import sys
from urllib.parse import SplitResult, urlsplit

from pydantic import TypeAdapter, ValidationError

from splitfl.channel.joining import JoinString
from splitfl.console import is_loopback, note, require_loopback
from splitfl.errors import ConfigError
from splitfl.wire.messages import Name


def read_join_string(address: str, name: str) -> JoinString | None:
    """The join string, if it is one and no other address. Raises ConfigError."""
    if address != "-" and not address.startswith("splitfl:"):
        return None
    join = JoinString.parse(sys.stdin.readline() if address == "-" else address)
    if name and name != join.name:
        raise ConfigError(f"this join string is {join.name!r}'s, not {name!r}'s", "Leave --name out.")
    return join


def check_address(address: str, *, insecure: bool) -> str:
    """The websocket address to join. Raises ConfigError."""
    parts = urlsplit(address)
    more = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme != "ws" or not parts.hostname or not has_port(parts) or more:
        shown = address.rpartition("@")[2]  # before it may stand a token
        raise ConfigError(
            f"{shown!r} is no address to join",
            "Give the whole line splitfl://... that the operator sent; on the server's own machine also ws://HOST:PORT.",
        )
    require_loopback(parts.hostname, insecure=insecure)
    return address


def say_how_encrypted(url: str) -> None:
    """Tell whoever joins without a join string what that means, once all else that was typed is right."""
    parts = urlsplit(url)
    if parts.scheme == "ws" and is_loopback(parts.hostname or ""):
        note("the link is NOT encrypted; it stays on this machine (a join string of `splitfl invite` encrypts)")


def has_port(parts: SplitResult) -> bool:
    """Whether the address names a port that can be one; a websocket's default, 80, is never meant."""
    try:
        return bool(parts.port)
    except ValueError:
        return False


def check_name(name: str) -> None:
    """Raise ConfigError for a name that the protocol does not carry; it is part of file names on both sides."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} is no client name",
            "Give --name NAME: letters, digits, dots, dashes and underscores, 64 at most.",
        ) from None
