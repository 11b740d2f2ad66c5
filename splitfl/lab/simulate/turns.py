"""Clients that take turns: each waits on its own link, and is in memory only while it has work.

A client of a simulation is a ``Participant`` like any other, started for one round and stopped after it as by Ctrl-C.
Until its next round its weights, moments and place in the data lie in its state folder, and what is left of it in
memory is an open link and a thread that waits for an answer. The trunk service cannot tell: it sees clients that stay,
and draws its cohorts from all who wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from client_model.choices import Choices
from client_model.events import Event
from client_model.participant import Participant, PausedError
from client_model.store import ClientStore
from splitfl.cut import Cut
from splitfl.errors import ProtocolError
from splitfl.lab.federation import hello_of
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import Answer, Finished, NextRound, Request, RoundOpen, Welcome


class TurnLink(MemoryLink):
    """A link that outlives the participants that use it, one after another; it counts each one's bytes from zero."""

    def wait(self, after: int) -> RoundOpen | Finished:
        """Ask for the round that follows ``after``, and wait for it. The next participant gets this answer."""
        answer = super().ask(NextRound(0, 0, after))
        if not isinstance(answer, RoundOpen | Finished):
            raise ProtocolError(f"{type(answer).__name__} instead of a round")
        self._turn = answer
        return answer

    def ask(self, message: Request) -> Answer:
        """As in ``MemoryLink``; a participant that asks for its round is told at once."""
        return self._turn if isinstance(message, NextRound) else super().ask(message)

    def traffic(self) -> dict[str, int]:
        """Bytes of this turn."""
        return {"bytes_sent": self.bytes_sent, "bytes_received": self.bytes_received}

    def end_turn(self) -> None:
        """What is sent from now on is the next participant's."""
        self.bytes_sent = self.bytes_received = 0


@dataclass
class TurnClient:
    """One client of a simulation, between its turns."""

    name: str
    data: Path
    state: Path
    cache: Path
    device: torch.device
    report: Callable[[Event], None]
    cut: Cut | None = None

    def join(self, service: MemoryService) -> None:
        """Connect. Raises RefusedError."""
        self.link = TurnLink(service, hello_of(self.name, self.cut))
        self.welcome: Welcome = self.link.open()

    def take_part(self, slots: AbstractContextManager[Any]) -> dict[str, Any]:
        """Take part until the federation ends, in memory only while in ``slots``; returns the closing report.

        Raises what the participant raises.
        """
        held = self.welcome.round
        while True:
            answer = self.link.wait(held)
            held = answer.round
            with slots:
                report = self._take_turn(held if isinstance(answer, Finished) else held - 1)
            if report is not None:
                return report

    def _take_turn(self, durable: int) -> dict[str, Any] | None:
        """One round, from its opening until the merge is durable; or what there is to do at the end: then a report."""
        over = False

        def hear(event: Event) -> None:
            nonlocal over
            if event.event == "round_durable":
                over = True
                event = replace(event, facts={**event.facts, **self.link.traffic()})
            self.report(event)

        participant = Participant(self.name, self.data, ClientStore(self.state), self.cache, self.device, hear)
        participant.stop = lambda: over
        participant.plan = Choices(self.cut)
        participant.accept = lambda _: True  # whoever runs this has written the terms
        participant.key_file = self.state / "key"
        participant.simulated = True
        try:
            return participant.run(self.link, replace(self.welcome, round=durable), URL)
        except PausedError:
            return None
        finally:
            if participant.guard is not None:
                participant.guard.close()
            vars(participant).clear()  # its callbacks refer to it: the weights would wait for the garbage collector
            self.link.end_turn()
