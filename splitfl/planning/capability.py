"""What a machine can do, as the probe measured it: memory, arithmetic, and its link to the server.

Seconds and bytes throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinkSpeed:
    """The way to the server and back: round trip in seconds, ``up`` and ``down`` in bytes a second."""

    rtt_s: float
    up: float
    down: float


@dataclass(frozen=True)
class Arithmetic:
    """Seconds a token: forward, backward and update of one trained block, forward of a frozen one, and the head with
    its loss, backward and update."""

    block_s: float
    frozen_block_s: float
    head_s: float


@dataclass(frozen=True)
class Capability:
    """One machine. ``memory``: bytes that this process may use in all; ``base``: bytes it holds before any model.

    ``compute``: its arithmetic by number format, "fp32" or "bf16".
    """

    device: str
    memory: int
    base: int
    compute: Mapping[str, Arithmetic]
    link: LinkSpeed
