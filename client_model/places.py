"""Where a client's files lie unless a flag says otherwise: under the XDG base directories of whoever runs it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

AUTHORITY_DIGITS = 16  # of a fingerprint: enough to tell servers apart


def default_state(url: str, name: str, authority: str = "") -> Path:
    """The state folder of the client ``name``. A server with an ``authority`` is known by it, wherever it moves."""
    states = base("XDG_STATE_HOME", "~/.local/state")
    by_address = states / f"{urlsplit(url).netloc.replace(':', '-')}-{name}"
    if not authority or by_address.exists():  # earlier drafts knew every server by its address
        return by_address
    return states / f"{authority[:AUTHORITY_DIGITS]}-{name}"


def default_cache() -> Path:
    """Fetched parts of base models, for all federations."""
    return base("XDG_CACHE_HOME", "~/.cache") / "blobs"


def default_key(identity: str) -> Path:
    """The secret key of the state folder with this ``identity``: not where the state is, for it locks it."""
    return base("XDG_CONFIG_HOME", "~/.config") / "keys" / f"{identity}.key"


def base(variable: str, usual: str) -> Path:
    return Path(os.environ.get(variable) or usual).expanduser() / "splitfl"
