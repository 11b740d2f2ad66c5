"""What the parts of a client need of a link: requests go out, and each gives a promise of its answer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from splitfl.wire.messages import Answer, Request


class Asker(Protocol):
    """The websocket link and the lab's in-process one both are."""

    def request(self, message: Request) -> Future[Answer]: ...
