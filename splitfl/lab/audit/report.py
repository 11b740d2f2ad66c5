"""What the attacks recovered, the strongest on top, beside what can be guessed without any release."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from splitfl.lab.audit.scores import Interval
from splitfl.lab.audit.updates import BagResult


@dataclass(frozen=True)
class Row:
    """One attack or baseline. ``simpler`` names attacks that it must not be weaker than; ``note`` qualifies it."""

    name: str
    recovery: Interval
    rouge_l: Interval
    seconds: float
    simpler: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class AuditReport:
    """Everything that one audit found. Attacks are sorted by recovery."""

    records: int
    tokens: int
    attacks: tuple[Row, ...]
    baselines: tuple[Row, ...]
    updates: tuple[BagResult, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> Row:
        """The attack that recovered most."""
        return self.attacks[0]

    @property
    def outdone(self) -> list[str]:
        """Attacks below a simpler one by more than their interval: undertrained, or public text is unlike the private.

        Their figure says little; the maximum holds.
        """
        found = {row.name: row.recovery.value for row in self.attacks}
        return [
            row.name
            for row in self.attacks
            if any(row.recovery.high < found[name] for name in row.simpler if name in found)
        ]

    @property
    def statement(self) -> str:
        """The one sentence that may be said of it."""
        worst = self.worst.recovery
        return (
            f"No guarantee. Our attacks recovered {worst.value:.1%} [{worst.low:.1%}, {worst.high:.1%}] of tokens, "
            "assuming an honest server."
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **asdict(self),
            "worst": asdict(self.worst),
            "outdone": self.outdone,
            "statement": self.statement,
        }

    def lines(self) -> Iterator[str]:
        """The report as text, a line at a time."""
        yield self.statement
        yield f"{self.records} records, {self.tokens} tokens; 95 % intervals over records; {self.seconds:.0f} s"
        yield ""
        yield f"{'attack':<38}{'tokens recovered':<24}{'ROUGE-L':<24}seconds"
        for row in self.attacks:
            yield line(row) + ("  (weaker than a simpler one: take the maximum)" if row.name in self.outdone else "")
        yield "without any release:"
        for row in self.baselines:
            yield line(row)
        for bag in self.updates:
            yield (
                f"head update: set of tokens named with precision {bag.precision:.2f}, recall {bag.recall:.2f}, "
                f"F1 {bag.f1:.2f} (commonest tokens: {bag.by_frequency:.2f})"
            )
        yield from self.notes


def line(row: Row) -> str:
    """A row of the table."""
    note = f"  ({row.note})" if row.note else ""
    return f"{row.name:<38}{row.recovery!s:<24}{row.rouge_l!s:<24}{row.seconds:>7.1f}{note}"
