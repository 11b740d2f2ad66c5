"""What a machine can do, as the probe measured it: memory, arithmetic, and its link to the server.

Seconds and bytes throughout. As JSON it is kept between starts, printed, and recorded for the tests and the docs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from splitfl.errors import ConfigError


@dataclass(frozen=True)
class LinkSpeed:
    """The way to the server and back: round trip in seconds, ``up`` and ``down`` in bytes a second."""

    rtt_s: float
    up: float
    down: float


@dataclass(frozen=True)
class Arithmetic:
    """Seconds a token: forward, backward and update of one trained block, forward of a frozen one, and the head with
    its loss and backward."""

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

    def as_json(self) -> str:
        """One JSON object; ``from_json`` reads it back equal."""
        return json.dumps(asdict(self) | {"compute": {name: asdict(own) for name, own in self.compute.items()}})

    @classmethod
    def from_json(cls, text: str) -> Capability:
        """Raises ConfigError for what ``as_json`` did not write."""
        try:
            table = json.loads(text)
            return cls(
                device=str(table["device"]),
                memory=int(table["memory"]),
                base=int(table["base"]),
                compute={str(name): numbers(Arithmetic, own) for name, own in table["compute"].items()},
                link=numbers(LinkSpeed, table["link"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError("this is no recorded capability", "Run the probe again with --refresh.") from error


N = TypeVar("N", LinkSpeed, Arithmetic)


def numbers(kind: type[N], table: Mapping[str, Any]) -> N:
    """A dataclass of finite, non-negative numbers. Raises ValueError, KeyError or TypeError."""
    values = {field.name: float(table[field.name]) for field in fields(kind)}
    if not all(math.isfinite(value) and value >= 0 for value in values.values()):
        raise ValueError("not finite")
    return kind(**values)
