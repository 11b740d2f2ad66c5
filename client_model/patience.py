"""How long a client waits for a server that is away: with growing pauses, saying why, and not for ever."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from splitfl.errors import LinkError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
A_WHILE_S = 90.0  # from here on in minutes


class Patience:
    """``limit_s`` seconds for the server at ``url``; ``say`` receives a line before each pause.

    ``met`` is whether it was ever there: else its address may be wrong.
    """

    def __init__(self, url: str, limit_s: float, say: Callable[[str], None], *, met: bool = False) -> None:
        self.url = url
        self.limit_s = limit_s
        self.say = say
        self.met = met
        self._begin()

    def _begin(self) -> None:
        self._pause, self._away_since = FIRST_PAUSE_S, time.monotonic()

    def renew(self) -> None:
        """The server was there: begin anew."""
        self.met = True
        self._begin()

    async def wait(self, reason: str) -> None:
        """Pause before the next try. Raises LinkError when the limit is over."""
        away = time.monotonic() - self._away_since
        if away > self.limit_s:
            raise self._over(away, reason)
        rest = self.limit_s - away
        left = f"gives up in {rest:.0f} s" if rest < A_WHILE_S else f"gives up in {rest / 60:.0f} min"
        hint = "" if self.met else "; if it should be there, check host and port"
        self.say(f"waiting for the server at {self.url} ({reason}); next try in {self._pause:g} s, {left}{hint}")
        await asyncio.sleep(self._pause * random.uniform(0.8, 1.2))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)

    def _over(self, away: float, reason: str) -> LinkError:
        if not self.met:
            return LinkError(
                f"the server at {self.url} was not reached in {away:.0f} s ({reason})",
                "Check host and port, and that `splitfl serve` runs there; then join again.",
            )
        return LinkError(
            f"the server at {self.url} has been away for {away:.0f} s ({reason})",
            "Check the address and that `splitfl serve` runs, then join again: the client goes on.",
        )
