"""Progress of a simulation for a person, on stderr: a bar on a terminal, a line a round elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from splitfl.config import Federation
from splitfl.lab.federation import FederationEvent
from splitfl.lab.simulate.history import History

COLUMNS = ("{task.description}", "cohort {task.fields[cohort]}", "{task.fields[losses]}")


class RoundBar:
    """Rounds, cohort and losses; ``hear`` takes every event of a simulation."""

    def __init__(self, settings: Federation, console: Console) -> None:
        self.settings = settings
        self.console = console
        live = console.is_terminal and not console.is_dumb_terminal
        texts = [TextColumn(column) for column in COLUMNS]
        self._bar = Progress(texts[0], BarColumn(), *texts[1:], TimeElapsedColumn(), console=console, disable=not live)
        self._live = live
        self._task = self._bar.add_task("preparing", total=settings.rounds.count, cohort="-", losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def hear(self, told: FederationEvent, history: History) -> None:
        """An event, and how things stand after it."""
        round_ = told.facts.get("round", 0)
        if told.event in ("round_open", "step") or (told.event == "round_durable" and not told.client):
            self._show(round_, history, durable=told.event == "round_durable")
        if told.event == "round_durable" and not told.client and not self._live:
            self.console.print(self._line(round_, history), highlight=False, soft_wrap=True)
        if told.event == "finished":
            self._bar.update(self._task, description="measuring every client")

    def _show(self, round_: int, history: History, *, durable: bool) -> None:
        cohort = len(history.cohorts.get(round_, ()))
        steps = len(history.losses.get(round_, ())) / max(1, cohort * self.settings.rounds.local_steps)
        self._bar.update(
            self._task,
            description=f"round {round_ + 1}/{self.settings.rounds.count}",
            completed=round_ + (1.0 if durable else min(1.0, steps)),
            cohort=str(cohort),
            losses=losses(round_, history),
        )

    def _line(self, round_: int, history: History) -> str:
        cohort = len(history.cohorts.get(round_, ()))
        return f"round {round_ + 1}/{self.settings.rounds.count}: {cohort} clients, {losses(round_, history)}"


def losses(round_: int, history: History) -> str:
    """A round's losses in words: in its steps, and on held-out rows before them."""
    training, held_out = history.training_loss(round_), history.held_out_loss(round_)
    said = {"training loss": training, "held-out loss before": held_out}
    return ", ".join(f"{name} {loss:.3f}" for name, loss in said.items() if loss is not None)
