"""Progress while processes work: a live table on a terminal, plain lines elsewhere. Always on stderr.

A view takes events and knows what a table of them looks like, and which of them deserve a line of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

Event = dict[str, Any]


class View(Protocol):
    """What the screen needs of a view."""

    def handle(self, name: str, event: Event) -> str:
        """Take an event in; the line that tells of it, or ""."""
        ...

    def table(self) -> Table:
        """How things stand."""
        ...


class Screen:
    """Stages and their progress, for a person."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal

    def stage(self, title: str) -> None:
        """A new part of the demo begins."""
        self.console.print(title, style="bold", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line below the stage's title."""
        self.console.print(f"  {text}", highlight=False, soft_wrap=True, markup=False)

    def follow(self, events: Iterable[tuple[str, Event]], view: View, take: Callable[[str, Event], None]) -> None:
        """Show ``events`` in ``view`` until they end, and give each to ``take``."""
        shown = Live(Shown(view), console=self.console, refresh_per_second=4) if self.live else nullcontext()
        with shown:
            for name, event in events:
                line = view.handle(name, event)
                if line and not self.live:
                    self.say(line)
                take(name, event)


@dataclass
class Shown:
    """A view as something that rich draws anew at each refresh."""

    view: View

    def __rich__(self) -> RenderableType:
        return self.view.table()


@dataclass
class ClientState:
    """What is known of one client."""

    doing: str = "starting"
    loss: float | None = None
    held_out: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    sent: int = 0
    received: int = 0


class FederationView:
    """Rounds, and for each client its loss, speed and traffic."""

    def __init__(self, clients: Iterable[str], rounds: int, local_steps: int) -> None:
        self.clients = {name: ClientState() for name in clients}
        self.rounds = rounds
        self.local_steps = local_steps
        self.round = 0  # from 0; the one that is open

    def handle(self, name: str, event: Event) -> str:
        if name not in self.clients:
            return self._handle_trunk(event)
        client = self.clients[name]
        match event.get("event"):
            case "fetching":
                client.doing = "fetching"
            case "waiting":
                client.doing = "waiting"
            case "step":
                client.doing = f"step {event['step'] + 1}/{self.local_steps}"
                client.loss, client.tokens_per_s = event["loss"], event["tokens_per_s"]
                client.sent, client.received = event["bytes_sent"], event["bytes_received"]
            case "evaluation":
                client.doing = "measured"
                client.held_out.append(event["loss"])
                return self._line(name, client, event["round"])
            case "round_durable":
                client.doing = "merged"
        if "report" in event:
            client.doing = "done"
            traffic = event["report"]["bytes"]
            client.sent, client.received = traffic["bytes_sent"], traffic["bytes_received"]
        return ""

    def _handle_trunk(self, event: Event) -> str:
        if event.get("event") == "listening":
            return f"the trunk listens on {event['url']}"
        if event.get("event") == "round_open":
            self.round = event["round"]
        return ""

    def _line(self, name: str, client: ClientState, rounds: int) -> str:
        held_out = client.held_out[-1]
        if client.loss is None:
            return f"before round 1   {name:<12} held-out loss {held_out:.3f}"
        return (
            f"after round {rounds}/{self.rounds}  {name:<12} held-out loss {held_out:.3f}  "
            f"training loss {client.loss:.3f}  {client.tokens_per_s:,.0f} tokens/s  "
            f"{megabytes(client.sent)} sent  {megabytes(client.received)} received"
        )

    def table(self) -> Table:
        title = f"round {min(self.round + 1, self.rounds)} of {self.rounds}, {self.local_steps} steps each"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="")
        table.add_column("client", style="bold", no_wrap=True)
        table.add_column("now", min_width=10, no_wrap=True)
        for column in ("training\nloss", "held-out\nloss", "tokens/s", "sent", "received"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, client in self.clients.items():
            table.add_row(name, *self._cells(client))
        total = sum(client.tokens_per_s for client in self.clients.values())
        sent, received = (sum(getattr(c, way) for c in self.clients.values()) for way in ("sent", "received"))
        table.add_row("together", "", "", "", f"{total:,.0f}", megabytes(sent), megabytes(received), style="dim")
        return table

    def _cells(self, client: ClientState) -> tuple[str, ...]:
        held_out = f"{client.held_out[0]:.2f} → {client.held_out[-1]:.2f}" if client.held_out else ""
        loss = "" if client.loss is None else f"{client.loss:.3f}"
        speed = f"{client.tokens_per_s:,.0f}" if client.tokens_per_s else ""
        traffic = (megabytes(client.sent), megabytes(client.received)) if client.sent else ("", "")
        return (client.doing, loss, held_out, speed, *traffic)


@dataclass
class TrainingState:
    """How far one model has been trained."""

    step: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0


class TrainingView:
    """Models that are trained whole: ``labels`` says what each is called here, ``steps`` how long it trains."""

    def __init__(self, labels: dict[str, str], steps: dict[str, int], *, lines: int) -> None:
        self.labels = labels
        self.steps = steps
        self.models = {model: TrainingState() for model in labels}
        self.lines = lines

    def handle(self, name: str, event: Event) -> str:  # noqa: ARG002 - the event names its model
        if event.get("event") != "step":
            return ""
        model = self.models[event["model"]]
        model.step, model.loss, model.tokens_per_s = event["step"] + 1, event["loss"], event["tokens_per_s"]
        steps = self.steps[event["model"]]
        if model.step % max(1, steps // self.lines) and model.step != steps:
            return ""
        label = self.labels[event["model"]]
        return f"{label:<25} step {model.step}/{steps}  loss {model.loss:.3f}  {model.tokens_per_s:,.0f} tokens/s"

    def table(self) -> Table:
        table = Table(box=None, padding=(0, 2), show_header=False)
        for model, state in self.models.items():
            steps = self.steps[model]
            bar = ProgressBar(total=steps, completed=state.step, width=20)
            loss = "" if state.loss is None else f"loss {state.loss:.3f}"
            speed = f"{state.tokens_per_s:,.0f} tokens/s" if state.tokens_per_s else ""
            table.add_row(self.labels[model], bar, f"step {state.step}/{steps}", loss, speed)
        return table


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
