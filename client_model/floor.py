"""The least privacy that a client takes part with, whatever it is offered: ``--privacy`` of ``splitfl join``.

``measured:0.3``
    whatever leaves carries noise of 0.3 of its own clip norms at least. A kind may be given a least of its own:
    ``measured:0.3,gradients:0.02,weights:0``. Weights have the noise of DP-SGD, or 0 where they are sent as they are.
``measured``
    the weakest that the mode's own names and defaults allow: ``measured:0.1,gradients:0.02,weights:0``.
``certified:8``
    an epsilon of 8 at most, at a delta of 1e-3 and of 1 / records at most.

It is compared with the noise that would really be drawn for this client's records, in every mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitfl.config import LEAVING, LEVELS, Privacy
from splitfl.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from splitfl.privacy.policy import Policy  # imports torch

OTHERS = "others"  # every kind that has no least of its own
WEAKEST = {OTHERS: LEVELS["light"], "gradients": Privacy().gradient_noise_multiplier, "weights": 0.0}
MOST_DELTA = 1e-3
ROUNDING = 1 - 1e-9  # a multiplier is sigma through clip norm


@dataclass(frozen=True)
class Floor:
    """``noise``: least noise multiplier by kind, where mode "measured" or better is asked for; ``epsilon``: the most,
    where "certified" is. Without either nothing is."""

    noise: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Raises ConfigError for what is no floor."""
        mode, *rest = text.split(",")
        name, colon, number = mode.partition(":")
        try:
            if name == "measured":
                default = {OTHERS: positive(number)} if colon else WEAKEST
                return cls(noise={**default, **dict(map(least_of_a_kind, rest))})
            if name == "certified" and not rest:
                return cls(epsilon=positive(number))
            if text == "off":
                return cls()
        except ValueError:
            pass
        raise ConfigError(
            f"{text!r} is no privacy floor",
            "Use --privacy off, measured, measured:NOISE, measured:NOISE,KIND:NOISE or certified:EPSILON; a KIND is "
            f"one of {', '.join(LEAVING)}.",
        )

    def check(self, policy: Policy, records: int) -> None:
        """Raise PrivacyError when ``policy`` would protect a client with so many records less than this."""
        if self.epsilon is not None:
            self._check_guarantee(self.epsilon, policy, min(MOST_DELTA, 1 / max(1, records)))
        for kind, noise in policy.noise.items():
            least = self.noise.get(kind, self.noise.get(OTHERS, 0.0))
            if noise < least * ROUNDING:
                refuse(f"the noise of its {kind} is {noise:.3g}", f"{least:g}")

    def _check_guarantee(self, most: float, policy: Policy, most_delta: float) -> None:
        if policy.epsilon is None:
            refuse(f'its privacy mode is "{policy.mode}"', '"certified"')
        elif policy.epsilon > most:
            refuse(f"its epsilon is {policy.epsilon:g}", f"{most:g}")
        elif policy.delta > most_delta:
            refuse(f"its delta is {policy.delta:g}", f"{most_delta:.2g}")


def refuse(what: str, least: str) -> None:
    """Raise PrivacyError."""
    raise PrivacyError(
        f"this federation is below this client's floor: {what}, and this client wants {least} at the weakest",
        "Ask the operator for more privacy, or lower --privacy.",
    )


def positive(number: str) -> float:
    """Raises ValueError for what is not a finite number above 0."""
    value = float(number)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def least_of_a_kind(text: str) -> tuple[str, float]:
    """``KIND:NOISE``; 0 lets the kind leave as it is, inf keeps it here. Raises ValueError."""
    kind, _, number = text.partition(":")
    value = float(number)
    if kind not in LEAVING or not value >= 0:
        raise ValueError
    return kind, value
