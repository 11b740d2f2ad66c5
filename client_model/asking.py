"""What the parts of a client need of a link: requests go out, and each gives a promise of its answer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from splitfl.errors import RefusedError
from splitfl.wire.messages import Answer, Failed, Request


class Asker(Protocol):
    """The websocket link and the lab's in-process one both are."""

    def request(self, message: Request) -> Future[Answer]:
        """Send a request; its future gives the answer."""
        ...

    def again(self, message: Request) -> Future[Answer] | None:
        """The answer's future, if an earlier start of this round has sent ``message``: its tensors need not be made.

        None for one that is new; it is to be made and sent.
        """
        ...


def settle(future: Future[Answer], answer: Answer) -> None:
    """Give a request its answer; a refusal is raised where it is awaited."""
    if isinstance(answer, Failed):
        future.set_exception(RefusedError(answer.reason, answer.remedy, code=answer.code))
    else:
        future.set_result(answer)
