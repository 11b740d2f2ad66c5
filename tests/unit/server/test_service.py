"""What the service does by itself, beside connections."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from server_model.service import Line, Service
from splitfl.errors import RefusedError
from splitfl.wire.messages import Refused


class Hung:
    """A connection that takes what is sent."""

    def __init__(self) -> None:
        self.closed = ""

    async def send(self, *_: object, **__: object) -> None: ...

    async def close(self, _: int, reason: str) -> None:
        self.closed = reason


def test_frame_that_comes_while_a_revoked_client_is_shut_out_hears_why() -> None:
    """Its session ends before its connection does, and a step's frame may lie between."""
    member, connection = SimpleNamespace(token="t", certificate="7"), Hung()
    line = Line(cast(Any, connection), 1000)
    heard: list[Refused | None] = []

    async def shut_out(_: object) -> None:
        heard.append(line.turned_out)

    async def ended() -> dict[str, RefusedError]:
        return {"7": RefusedError("the server's operator has revoked this client", "Ask.", code="revoked")}

    service = SimpleNamespace(coordinator=SimpleNamespace(members=[member], shut_out=shut_out), lines={"t": line})

    async def scenario() -> None:
        await Service._shut_out(cast(Service, service), cast(Any, SimpleNamespace(ended=ended)))
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert [refused.code for refused in heard if refused is not None] == ["revoked"]
    assert connection.closed == "revoked"
