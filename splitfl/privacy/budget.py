"""What a record, or a whole client, may still spend: a filter on mu^2 that was set before anything left.

The sum is checked against a bound that never moves (Smith and Thakurta 2022), so records may be left out as they run
dry. "epsilon spent so far", read off and acted upon, would be no guarantee.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from splitfl.errors import PrivacyError
from splitfl.privacy.charges import RecordRef, step_rows
from splitfl.privacy.ledger import EVERYTHING, Ledger, Row
from splitfl.privacy.policy import Policy

ROUNDING = 1 + 1e-9  # budgets are sums of floats


class Budget:
    """The ledger against the policy's bounds."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self.policy = policy
        self.ledger = ledger

    @property
    def bound(self) -> float:
        """mu^2 of the unit, a record or the whole client; infinite without a target."""
        return self.policy.run_budget if self.policy.unit == "client" else self.policy.record_budget

    def allows(self, rows: Iterable[Row]) -> bool:
        """Whether all of these rows fit into what is left."""
        added: defaultdict[bytes, float] = defaultdict(float)
        for row in rows:
            if row.mu_squared > 0:
                added[row.charged_to] += row.mu_squared
        if not added or math.isinf(self.bound):
            return True
        if self.policy.unit == "client":
            return self.ledger.total + sum(added.values()) <= self.bound * ROUNDING
        shared = added.pop(EVERYTHING, 0.0)
        bearers = {EVERYTHING, *self.ledger.spent, *added} if shared else added.keys()
        return all(self.ledger.spent_on(key) + added.get(key, 0.0) + shared <= self.bound * ROUNDING for key in bearers)

    def check(self, rows: Iterable[Row]) -> None:
        """Raise PrivacyError when these rows would break a bound: the last check, whatever was asked before."""
        if not self.allows(rows):
            raise PrivacyError(
                "the privacy budget is spent: another release would break epsilon",
                "Nothing more leaves. More would need a new agreement; what is spent stays spent.",
            )


class Reservation:
    """Picks the records of one step: whom it says yes to, the whole step can be paid for.

    ``is_paid``: whether a record's activation needs no row any more.
    """

    def __init__(self, budget: Budget, is_paid: Callable[[RecordRef], bool]) -> None:
        self.budget = budget
        self.is_paid = is_paid
        self.records: list[RecordRef] = []
        self.fresh: list[RecordRef] = []

    def __call__(self, key: bytes, padded_length: int, trains: bool) -> bool:
        """Whether this record may take part too, to train on or (``trains`` False) to measure with."""
        if math.isinf(self.budget.bound):
            return True
        record = RecordRef(key, padded_length)
        records = [*self.records, record]
        fresh = self.fresh if self.is_paid(record) else [*self.fresh, record]
        if not self.budget.allows(step_rows(self.budget.policy, records, fresh, trains=trains)):
            return False
        self.records, self.fresh = records, fresh
        return True
