"""Capability x model x federation -> every plan weighed, and the one to take."""

from __future__ import annotations

from collections.abc import Sequence

from splitfl.config import Federation
from splitfl.planning.capability import Arithmetic, Capability
from splitfl.planning.plan import Candidate
from splitfl.planning.shapes import ModelShape


def candidates(
    capability: Capability, shape: ModelShape, settings: Federation, *, trunk: Arithmetic | None = None
) -> list[Candidate]:
    """Every plan, with its predicted peak and step time. ``trunk``: its seconds a token; None = the client's own."""
    raise NotImplementedError


def choose(weighed: Sequence[Candidate]) -> Candidate:
    """The plan to take. Raises PlanError when none can be taken."""
    raise NotImplementedError
