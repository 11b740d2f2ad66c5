"""The join string: one line that tells a client where to go, who it is, and whom to trust.

    splitfl://NAME:TOKEN@HOST:PORT/SHA256

``SHA256`` is the fingerprint of the server's certificate authority, ``TOKEN`` a secret that works once. Nothing in it
means anything to a shell, so it needs no quotes. Whoever has enrolled may leave ``:TOKEN`` out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from splitfl.errors import ConfigError
from splitfl.wire.messages import CLIENT_NAME

SCHEME = "splitfl"
FINGERPRINT = r"[0-9a-f]{64}"
TOKEN_BYTES = 32
TOKEN = r"[A-Za-z0-9_-]{43}"  # that many bytes in base64


@dataclass(frozen=True)
class JoinString:
    """What a client needs to join. ``token`` is kept out of ``repr``; ``str`` gives the whole line, secret included."""

    host: str
    port: int
    name: str
    authority: str  # SHA-256 of the authority's certificate (DER), hexadecimal
    token: str = field(default="", repr=False)

    def __str__(self) -> str:
        secret = f":{self.token}" if self.token else ""
        return f"{SCHEME}://{self.name}{secret}@{self.netloc}/{self.authority}"

    @property
    def netloc(self) -> str:
        """``HOST:PORT``, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address to connect to, without anything secret."""
        return f"wss://{self.netloc}"

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Read a join string. Raises ConfigError, which says what is wrong and never repeats the token."""
        parts = split(text.strip())
        if parts.scheme != SCHEME:
            raise unreadable("it does not begin with splitfl://")
        port = port_of(parts)
        if not parts.hostname or port is None:
            raise unreadable("there is no HOST:PORT in it")
        name, token, authority = parts.username or "", parts.password or "", parts.path.strip("/")
        if not re.fullmatch(CLIENT_NAME, name):
            raise unreadable("there is no client name in it")
        if token and not re.fullmatch(TOKEN, token):
            raise unreadable("its token is cut off or misspelt")
        if not re.fullmatch(FINGERPRINT, authority) or parts.query or parts.fragment:
            raise unreadable("the fingerprint at its end is cut off or misspelt")
        return cls(parts.hostname, port, name, authority, token)


def split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise unreadable("it is no address") from None


def port_of(parts: SplitResult) -> int | None:
    try:
        return parts.port or None
    except ValueError:
        return None


def unreadable(reason: str) -> ConfigError:
    return ConfigError(
        f"this join string cannot be read: {reason}", "Copy the whole line that `splitfl invite` printed."
    )
