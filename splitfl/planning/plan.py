"""What a planner decides for one client, and what it knows of each plan it weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitfl.cut import Cut


@dataclass(frozen=True)
class Plan:
    """How one client takes part: its cut, the pieces of a step, arithmetic ("fp32" or "bf16"), number format on the
    wire, and the pieces that are under way at once."""

    cut: Cut
    micro_batches: int
    dtype: str
    codec: str
    in_flight: int


@dataclass(frozen=True)
class Candidate:
    """A plan, weighed. ``peak_bytes`` of the whole process against the ``limit_bytes`` it may have; ``step_s``, seconds
    of one optimizer step; ``forbidden``: which of the federation's settings rules it out, "" where none does.

    ``parts`` says where both go: names in ``_bytes`` and in ``_s``. ``trunk_blocks`` is 0 for an empty trunk.
    """

    plan: Plan
    peak_bytes: int
    limit_bytes: int
    step_s: float
    trunk_blocks: int
    parts: Mapping[str, float]
    forbidden: str = ""

    @property
    def missing_bytes(self) -> int:
        """By how much the peak is over the limit."""
        return max(0, self.peak_bytes - self.limit_bytes)

    @property
    def pace_s(self) -> float:
        """Seconds a step, over a whole round: what plans are compared by."""
        return self.step_s + self.parts["update_s"]

    @property
    def refused(self) -> str:
        """Why this plan cannot be chosen; "" when it can."""
        if self.forbidden or not self.missing_bytes:
            return self.forbidden
        return f"memory: needs {gib(self.peak_bytes)}, has {gib(self.limit_bytes)}"


def gib(nbytes: float) -> str:
    """Bytes for a reader."""
    return f"{nbytes / 2**30:.2f} GiB"
