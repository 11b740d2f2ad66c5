"""Machines apart from any model: memory, a link, and arithmetic in operations a second.

A probe measures one machine with one model. What a kind of machine would do with a model that nobody has fetched yet is
estimated here, from the 2 operations that a weight and a token cost forward, and the 4 that they cost backward
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1). The documentation's table and the tests plan with such machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from splitfl.planning.capability import Arithmetic, Capability, LinkSpeed
from splitfl.planning.shapes import ModelShape

FORWARD, FORWARD_AND_BACKWARD = 2, 6  # operations for each weight and token


@dataclass(frozen=True)
class Machine:
    """``about`` it in words; ``memory`` and ``base`` in bytes, as a Capability has them; ``operations`` a second
    that it keeps up, by number format."""

    about: str
    device: str
    memory: int
    base: int
    operations: Mapping[str, float]
    link: LinkSpeed

    @classmethod
    def read(cls, path: Path) -> Machine:
        """A recorded machine: one JSON file."""
        table = json.loads(path.read_text())
        return cls(**{**table, "link": LinkSpeed(**table["link"])})

    def with_model(self, shape: ModelShape) -> Capability:
        """What this machine can do with blocks and head of ``shape``."""
        compute = {name: arithmetic(shape, speed) for name, speed in self.operations.items()}
        return Capability(self.device, self.memory, self.base, compute, self.link)


def arithmetic(shape: ModelShape, operations: float) -> Arithmetic:
    """Seconds a token at so many operations a second. Of several experts only those that see a token compute."""
    idle = (shape.experts - shape.active) * (2 + shape.gated) * shape.hidden * shape.intermediate
    block = (shape.block_weights - idle) / operations
    return Arithmetic(
        FORWARD_AND_BACKWARD * block, FORWARD * block, FORWARD_AND_BACKWARD * shape.head_weights / operations
    )
