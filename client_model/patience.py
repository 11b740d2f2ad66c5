"""How long a client waits for a server that is away: with growing pauses, saying why, and not for ever."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from splitfl.errors import LinkError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class Patience:
    """``limit_s`` seconds for the server at ``url``; ``say`` receives a line before each pause."""

    def __init__(self, url: str, limit_s: float, say: Callable[[str], None]) -> None:
        self.url = url
        self.limit_s = limit_s
        self.say = say
        self.renew()

    def renew(self) -> None:
        """The server was there: begin anew."""
        self._pause, self._away_since = FIRST_PAUSE_S, time.monotonic()

    async def wait(self, reason: str) -> None:
        """Pause before the next try. Raises LinkError when the limit is over."""
        away = time.monotonic() - self._away_since
        if away > self.limit_s:
            raise LinkError(
                f"the server at {self.url} has been away for {away:.0f} s ({reason})",
                "Check the address and that `splitfl serve` runs, then join again: the client goes on.",
            )
        self.say(f"waiting for the server at {self.url} ({reason}); next try in {self._pause:.0f} s")
        await asyncio.sleep(self._pause * random.uniform(0.8, 1.2))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
