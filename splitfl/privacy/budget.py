"""What a record, or a whole client, may still spend: a filter on mu^2 that was set before anything left.

The sum is checked against a bound that never moves (Smith and Thakurta 2022), so records may be left out as they run
dry. "epsilon spent so far", read off and acted upon, would be no guarantee.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splitfl.errors import PrivacyError
from splitfl.privacy.ledger import Ledger, Row
from splitfl.privacy.policy import Policy

ROUNDING = 1 + 1e-9  # budgets are sums of floats


class Budget:
    """The ledger against the policy's bounds."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self.policy = policy
        self.ledger = ledger

    def allows(self, key: bytes, cost: float, pending: Mapping[bytes, float]) -> bool:
        """Whether the record ``key`` may spend ``cost`` more (mu^2), beside what is promised and not yet written."""
        if cost == 0:
            return True
        if self.policy.unit == "client":
            return self.ledger.total + sum(pending.values()) + cost <= self.policy.run_budget * ROUNDING
        return self.ledger.spent_on(key) + pending.get(key, 0.0) + cost <= self.policy.record_budget * ROUNDING

    def check(self, rows: Iterable[Row]) -> None:
        """Raise PrivacyError when these rows would break a bound: the last check, whatever was asked before."""
        pending: dict[bytes, float] = {}
        for row in rows:
            if not self.allows(row.record, row.mu_squared, pending):
                raise PrivacyError(
                    "the privacy budget is spent: another release would break epsilon",
                    "Nothing more leaves. More would need a new agreement; what is spent stays spent.",
                )
            pending[row.record] = pending.get(row.record, 0.0) + row.mu_squared
