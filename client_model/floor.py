"""The least privacy that a client takes part with, whatever it is offered: ``--privacy MODE[:NUMBER]``.

``measured:0.3`` asks for noise of 0.3 clip norms at least, ``certified:8`` for an epsilon of 8 at most. ``measured``
alone asks for the lightest named level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitfl.config import LEVELS, Federation
from splitfl.errors import ConfigError, PrivacyError

MODES = ("off", "measured", "certified")  # weakest first


@dataclass(frozen=True)
class Floor:
    """``number``: least noise in clip norms for measured, most epsilon for certified; None = the mode's own."""

    mode: str = "off"
    number: float | None = None

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Raises ConfigError for a mode or number that is none."""
        mode, colon, number = text.partition(":")
        try:
            floor = cls(mode, float(number) if colon else None)
        except ValueError:
            floor = cls("")
        if floor.mode not in MODES or (floor.number is not None and not floor.number > 0):
            raise ConfigError(
                f"{text!r} is no privacy floor",
                "Use --privacy off, measured, measured:NOISE, certified or certified:EPSILON.",
            )
        return floor

    def check(self, settings: Federation) -> None:
        """Raise PrivacyError for a federation below it."""
        privacy = settings.privacy
        if MODES.index(privacy.mode) < MODES.index(self.mode):
            self._refuse(f'its privacy mode is "{privacy.mode}"', f'"{self.mode}"')
        if privacy.mode == "measured" and self.mode == "measured":
            least = LEVELS["light"] if self.number is None else self.number
            noise = LEVELS[privacy.level] if privacy.noise_multiplier is None else privacy.noise_multiplier
            if noise < least:
                self._refuse(f"its noise is {noise:g} clip norms", f"{least:g}")
        if privacy.epsilon is not None and self.mode == "certified" and privacy.epsilon > (self.number or math.inf):
            self._refuse(f"its epsilon is {privacy.epsilon:g}", f"{self.number:g}")

    def _refuse(self, what: str, least: str) -> None:
        raise PrivacyError(
            f"this federation is below this client's floor: {what}, and this client wants {least} at the weakest",
            "Ask the operator for more privacy, or lower --privacy.",
        )
