"""A simulation's picture: losses by round, who holds what, and where every client ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from splitfl.errors import StorageError
from splitfl.lab.demo.plots import BLUE, GREY, ORANGE, UNITS, legend_below, tidy
from splitfl.lab.simulate.results import Row, clients, rounds
from splitfl.lab.simulate.run import SimulationResult

HOLLOW: dict[str, Any] = {"color": BLUE, "marker": "o", "markerfacecolor": "white"}


def draw(result: SimulationResult, path: Path) -> None:
    """Write the picture as a PNG. Raises StorageError."""
    figure = Figure(figsize=(15, 4.6), layout="constrained", facecolor="white")
    curves, holdings, ends = figure.subplots(1, 3, width_ratios=[1.1, 1.0, 1.0])
    draw_curves(rounds(result), curves)
    by_size = sorted(clients(result), key=lambda row: -int(row["rows"]))
    draw_holdings(by_size, holdings)
    draw_ends(by_size, ends)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", "Check the disk's free space.") from error


def draw_curves(table: list[Row], panel: Axes) -> None:
    """Training and held-out loss by round. A line joins only what all clients measured: cohorts hold other rows."""
    measured = [row for row in table if row["held_out_loss"] is not None]
    all_ = table[-1]["held_out_clients"]  # all that have held-out rows
    everybody = [row for row in measured if row["held_out_clients"] == all_]
    cohorts = [row for row in measured if row["held_out_clients"] != all_]
    between = "none" if cohorts else "-"
    for rows, column, label, style in (
        (
            table,
            "training_loss",
            "training, the round's clients",
            {"color": ORANGE, "marker": "s", "linestyle": between},
        ),
        (cohorts, "held_out_loss", "held out, only the next round's clients", {**HOLLOW, "linestyle": "none"}),
        (everybody, "held_out_loss", "held out, all clients", {"color": BLUE, "marker": "o", "linewidth": 2}),
    ):
        points = [(row["round"], row[column]) for row in rows if row[column] is not None]
        panel.plot(*zip(*points, strict=True), label=label, **style) if points else None
    panel.set_title("Loss by round" + (": each round other clients" if cohorts else ""), fontsize=11)
    panel.set_xlabel("rounds trained")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("loss (nats per token)")
    legend_below(panel, 1)
    tidy(panel, grid="y")


def draw_holdings(table: list[Row], panel: Axes) -> None:
    """Rows of each client, stacked by group."""
    groups = sorted({group for row in table for group in row["groups"]})
    floor = [0] * len(table)
    colours = matplotlib.colormaps["tab20"]
    for number, group in enumerate(groups or [""]):
        counts = [row["groups"].get(group, 0) if groups else row["rows"] for row in table]
        colour = colours(number % 20) if groups else GREY
        panel.bar(range(len(table)), counts, 1.0, bottom=floor, color=colour, label=group)
        floor = [below + count for below, count in zip(floor, counts, strict=True)]
    panel.set_xlim(-0.5, len(table) - 0.5)
    panel.set_title("Rows of each client", fontsize=11)
    panel.set_xlabel("clients, largest first")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(groups) <= 10:
        legend_below(panel, 3)
    tidy(panel, grid="y")


def draw_ends(table: list[Row], panel: Axes) -> None:
    """Each client's last held-out loss, in the order of their rows."""
    last = {place: list(row["held_out_losses"].values())[-1:] for place, row in enumerate(table)}
    points = [(place, loss) for place, losses in last.items() for loss in losses]
    panel.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=4) if points else None
    panel.set_xlim(-0.5, len(table) - 0.5)  # beside the rows of the same clients
    panel.set_title("Each client at the end", fontsize=11)
    panel.set_xlabel("clients, largest first")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel(UNITS)
    tidy(panel, grid="y")
