"""What tests of refusals share: a small federation, one that only gathers, and how a command or a service takes it."""

from __future__ import annotations

from typing import Any

from processes import Command, Server, with_settings
from raw_client import RawClient

from splitfl.errors import SplitFLError
from splitfl.wire.messages import Welcome

SETTINGS: dict[str, dict[str, Any]] = {
    "rounds": {"count": 1, "local_steps": 1},
    "batch": {"records": 4, "max_length": 32},
    "wire": {"codec": "fp32"},
    "trunk": {"grace_s": 5.0},
}
GATHERING = with_settings(SETTINGS, rounds={"min_clients": 9})  # no round ever opens


def assert_ends(command: Command, kind: type[SplitFLError], *parts: str) -> None:
    """It ends with the exit code of ``kind`` and one line that has these parts: the thing and the remedy."""
    assert command.wait() == kind.exit_code, command.story()
    for part in parts:
        assert part in command.error, command.story()


def assert_open(server: Server) -> None:
    """The service still welcomes clients."""
    with RawClient(server.url, "somebody") as client:
        assert isinstance(client.greeting, Welcome)
