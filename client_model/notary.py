"""Has the server countersign this client's ledger after every step, without waiting for it."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from client_model.asking import Asker
from client_model.link import SessionLostError
from splitfl.errors import LinkError, ProtocolError
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.witness import Mark, check_signature
from splitfl.wire.messages import Answer, Countersign, Countersigned


class Notary:
    """Sends the ledger's head and checks what comes back against the key that signed first."""

    def __init__(self, link: Asker, ledger: Ledger, client: str, signer: str) -> None:
        self.link = link
        self.ledger = ledger
        self.client = client
        self.signer = signer
        self._sent = 0
        self._replies: deque[Future[Answer]] = deque()

    def mark(self) -> None:
        """Send the ledger's state, if it has grown, and look at the answers that are there."""
        if self.ledger.count > self._sent:
            self._sent = self.ledger.count
            self._replies.append(self.link.request(Countersign(0, 0, self.ledger.count, self.ledger.head.hex())))
        while self._replies and self._replies[0].done():
            self._check(self._replies.popleft())

    def settle(self) -> None:
        """Wait for what is unanswered."""
        while self._replies:
            self._check(self._replies.popleft())

    def _check(self, reply: Future[Answer]) -> None:
        """Raises RefusedError when the server has seen a longer ledger, ProtocolError for a signature that is none."""
        try:
            answer = reply.result()
        except SessionLostError:
            raise  # nothing else may be asked before it is acknowledged
        except LinkError:
            return  # the server went away; whoever asks next hears of it
        if not isinstance(answer, Countersigned):
            raise ProtocolError(f"{type(answer).__name__} instead of a countersignature")
        check_signature(self.signer, self.client, Mark(answer.rows, answer.head), answer.signature)
