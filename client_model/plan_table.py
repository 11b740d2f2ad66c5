"""What `splitfl probe` shows: what was measured, the best plan of every cut and arithmetic that may be
taken, which one is, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from client_model.probe import Probe
from client_model.scouting import Scouted
from client_model.timing import Spread
from splitfl.errors import SplitFLError
from splitfl.planning.plan import Candidate, gib
from splitfl.planning.planner import candidates, choose, shortlist, why

MOST_ROWS = 40


@dataclass(frozen=True)
class Weighed:
    """Every plan; ``chosen`` is None when none can be taken, for the reason ``refusal``."""

    candidates: list[Candidate]
    chosen: Candidate | None
    refusal: SplitFLError | None

    def require_choice(self) -> None:
        """Raise the PlanError of a machine that no plan fits."""
        if self.refusal is not None:
            raise self.refusal

    @property
    def why(self) -> str:
        """The reason for the choice, or for there being none."""
        return str(self.refusal) if self.chosen is None else why(self.chosen, self.candidates)


def weigh(found: Scouted) -> Weighed:
    """All plans for what was measured."""
    weighed = candidates(found.probe.capability, found.shape, found.settings)
    try:
        return Weighed(weighed, choose(weighed), None)
    except SplitFLError as error:
        return Weighed(weighed, None, error)


def as_json(found: Scouted, weighed: Weighed) -> dict[str, Any]:
    """Everything, for a program: bytes and seconds."""
    probe = found.probe
    return {
        "machine": {
            "device": probe.device,
            "memory": probe.room.usable,
            "memory_limit": probe.room.source,
            "base": probe.base,
            "base_data": probe.base_data,
            "compute": {dtype: asdict(pace) for dtype, pace in probe.pace.items()},
            "link": asdict(probe.link),
        },
        "candidates": [row(one) for one in weighed.candidates],
        "choice": None if weighed.chosen is None else row(weighed.chosen),
        "why": weighed.why,
    }


def row(one: Candidate) -> dict[str, Any]:
    """A candidate as JSON."""
    facts = asdict(one) | {"cut": str(one.plan.cut), "refused": one.refused}
    return facts | {"plan": {**asdict(one.plan), "cut": str(one.plan.cut)}}


def show(found: Scouted, weighed: Weighed) -> None:
    """For a person, on stdout."""
    console = Console(highlight=False)
    for line in measured_lines(found.probe):
        console.print(line)
    table = Table("cut", "trunk", "pieces", "arithmetic", "wire", "memory", "step", "", box=None)
    listed = shortlist(weighed.candidates)
    rows = [one for one in listed if not one.forbidden] or listed
    for one in rows[:MOST_ROWS]:
        plan = one.plan
        mark = "<- taken" if one == weighed.chosen else one.refused
        step = "" if one.forbidden else f"{one.step_s:.2f} s"
        sizes = (str(plan.cut), str(one.trunk_blocks), str(plan.micro_batches), plan.dtype, plan.codec)
        table.add_row(*sizes, gib(one.peak_bytes), step, mark, style="bold" if one == weighed.chosen else None)
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"and {len(rows) - MOST_ROWS} rows more: --json has every plan")
    if weighed.chosen is not None:
        console.print(f"[bold]{weighed.chosen.plan.cut}[/bold]: {weighed.why}")


def measured_lines(probe: Probe) -> Iterable[str]:
    """The machine in words; spreads as least-greatest."""
    room = probe.room
    yield f"memory: {gib(room.usable)} for this process ({room.source}), {gib(probe.base)} of it before any model"
    for dtype, pace in probe.pace.items():
        micro = [
            f"{what} {shown(spread, 1e6)}"
            for what, spread in (("a block", pace.block), ("a frozen one", pace.frozen_block), ("the head", pace.head))
        ]
        yield f"{dtype} on {probe.device}, microseconds a token: {', '.join(micro)}"
    link = probe.link
    rates = f"up {shown(link.up, 8e-6)}, down {shown(link.down, 8e-6)} Mbit/s"
    yield f"link: round trip {shown(link.rtt, 1e3)} ms, {rates}"


def shown(spread: Spread, factor: float) -> str:
    """A median with its spread, in units of 1 / ``factor``."""
    low, median, high = (f"{factor * value:.4g}" for value in (spread.low, spread.median, spread.high))
    return median if low == high else f"{median} ({low}-{high})"
