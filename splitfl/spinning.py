"""How torch's threads wait for one another: awake at a step's many short barriers, asleep when it takes longer.

Left alone libgomp spins for milliseconds, and processes that share the cores (a client and a trunk, several clients)
take them from each other. Threads that never spin pay a wake-up at every barrier: a step took a tenth longer.
"""

from __future__ import annotations

from collections.abc import Mapping

BRIEF_SPINS = "50000"  # a sixth of what libgomp takes by itself


def brief_spins(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to ``environment`` before torch is imported; nothing where it says already how threads wait."""
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys()
    return {} if said else {"GOMP_SPINCOUNT": BRIEF_SPINS}
