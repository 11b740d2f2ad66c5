"""What a client says while it takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something a person or a program wants to see while it happens."""

    event: str
    facts: dict[str, Any]
