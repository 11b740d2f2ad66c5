"""Who holds the others up: said by name when a federation has stood still for a while, so that nobody has to guess."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from server_model.rounds import Rounds

QUIET_S = 15.0  # without any progress, until somebody is named
CHECK_S = 1.0


@dataclass
class Standstill:
    """Notices that nothing has changed for ``after_s`` seconds, once for each standstill."""

    after_s: float
    state: object = None
    since: float = 0.0
    said: bool = False

    def is_news(self, state: object, now: float) -> bool:
        """Whether ``state`` has been the same for long enough, and was not told before."""
        if state != self.state:
            self.state, self.since, self.said = state, now, False
        if self.said or now - self.since < self.after_s:
            return False
        self.said = True
        return True


async def name_the_awaited(rounds: Rounds, after_s: float = QUIET_S) -> None:
    """Report ``waiting_for`` in each standstill, until the federation has ended."""
    standstill = Standstill(after_s)
    while not rounds.finished.is_set():
        clients, missing = rounds.awaited()
        if standstill.is_news((rounds.progress, clients, missing), rounds.clock()) and (clients or missing):
            rounds.say("waiting_for", clients=clients, missing=missing)
        await asyncio.sleep(min(CHECK_S, after_s / 3))
