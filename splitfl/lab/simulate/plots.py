"""A simulation's picture: losses by round, who holds what, and where every client ends."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from splitfl.errors import StorageError
from splitfl.lab.demo.plots import BLUE, GREY, ORANGE, UNITS, tidy
from splitfl.lab.simulate.results import Row, clients, rounds
from splitfl.lab.simulate.run import SimulationResult


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
    """Training and held-out loss by round."""
    for column, label, color, marker in (
        ("training_loss", "training, in the round", ORANGE, "s"),
        ("held_out_loss", "held out, after it", BLUE, "o"),
    ):
        points = [(row["round"], row[column]) for row in table if row[column] is not None]
        panel.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, linewidth=2) if points else None
    panel.set_title("Losses, of the clients in each round", fontsize=11)
    panel.set_xlabel("rounds trained")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False)
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
    panel.set_title("Rows of each client", fontsize=11)
    panel.set_xlabel("clients, largest first")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(groups) <= 10:
        panel.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    tidy(panel, grid="y")


def draw_ends(table: list[Row], panel: Axes) -> None:
    """Each client's last held-out loss by its number of rows."""
    points = [(row["rows"], list(row["held_out_losses"].values())[-1]) for row in table if row["held_out_losses"]]
    panel.scatter([rows for rows, _ in points], [loss for _, loss in points], color=BLUE, s=18, alpha=0.7)
    panel.set_title("Each client at the end", fontsize=11)
    panel.set_xlabel("its rows")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel(UNITS)
    tidy(panel, grid="y")
