"""Pictures of benchmarks. Colours as in the demo's; markers and labels say the same once more."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from splitfl.errors import StorageError
from splitfl.lab.bench.federation import ALONE
from splitfl.lab.bench.harness import Result
from splitfl.lab.bench.planner import PEAK_WITHIN, STEP_WITHIN
from splitfl.lab.demo.plots import BLUE, GREEN, GREY, ORANGE, UNITS, legend_below, tidy

BASELINES = {
    "no fine-tuning": (":", GREY),
    "ends-only": ("--", ORANGE),
    "top-only": ("-.", GREEN),
    "noise-free split": ("-", GREY),
}
LINES = {"local-only": ("--", ORANGE), "centralised": ("-", GREEN)}
TITLES = {"group": "each hospital one specialty", "dirichlet": "Dirichlet over specialties"}
LANES = {"client": BLUE, "up": ORANGE, "trunk": GREEN, "down": GREY}
COLOURS = (BLUE, ORANGE, GREEN)
NEAR: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


def draw_frontier(result: Result, path: Path) -> None:
    """Loss against recovery, a curve a mechanism; baselines as lines. Raises StorageError.

    What is worse than the worst baseline stands at the upper edge with its loss: how much worse makes no difference.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained", facecolor="white")
    panel = figure.subplots()
    edge = 1.04 * max(row["loss_noisy"]["max"] for row in result.rows if row["mechanism"] in BASELINES)
    styles = cycle([("s", ORANGE), ("o", BLUE), ("^", GREEN)])
    for (name, rows), (marker, colour) in zip(by_mechanism(result.rows).items(), styles, strict=False):
        recovery = [row["recovery"]["median"] for row in rows]
        losses = [min(edge, row["loss_noisy"]["median"]) for row in rows]
        panel.errorbar(
            recovery,
            losses,
            yerr=around([row["loss_noisy"] for row in rows]),
            marker=marker,
            color=colour,
            capsize=3,
            label=name,
        )
        for x, y, row in zip(recovery, losses, rows, strict=True):
            loss = row["loss_noisy"]["median"]
            label = f"{row['level']:g}" if loss <= edge else f"{row['level']:g}\n(loss {loss:.1f})"
            side, away = ("left", 6) if x < 0.6 else ("right", -6)
            panel.annotate(label, (x, y), xytext=(away, 6), ha=side, **NEAR)
    for row in result.rows:
        if row["mechanism"] in BASELINES:
            line, colour = BASELINES[row["mechanism"]]
            panel.axhline(row["loss_noisy"]["median"], linestyle=line, color=colour, label=row["mechanism"])
    panel.axvline(0.25, color="#BBBBBB", linewidth=0.8)
    panel.set_xlim(0, 1.02)
    panel.set_ylim(top=1.02 * edge)
    panel.set_xlabel("tokens that the strongest of our attacks recovered (a lower bound); labels: noise / clip norm")
    panel.set_ylabel(UNITS)
    legend_below(panel, 3)
    tidy(panel, grid="y")
    save(figure, path)


def draw_federation(result: Result, path: Path) -> None:
    """Loss by strategy with its spread, a panel a partition; baselines as lines. Raises StorageError."""
    kinds = list(dict.fromkeys(row["partition"] for row in result.rows))
    figure = Figure(figsize=(6.5 * len(kinds), 5), layout="constrained", facecolor="white")
    for panel, kind in zip(
        figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0], kinds, strict=True
    ):
        draw_partition({row["model"]: row["union"] for row in result.rows if row["partition"] == kind}, panel)
        panel.set_title(TITLES[kind], fontsize=11)
    save(figure, path)


def draw_planner(result: Result, path: Path) -> None:
    """Measured against predicted, memory and time; the band is what a prediction may be off. Raises StorageError."""
    figure = Figure(figsize=(10, 4.5), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    kinds = (("peak", PEAK_WITHIN, 2**20, "peak memory, MiB"), ("step_s", STEP_WITHIN, 1.0, "seconds a step"))
    for panel, (kind, within, unit, title) in zip(panels, kinds, strict=True):
        told = [row[f"predicted_{kind}"] / unit for row in result.rows]
        line = [0.9 * min(told), 1.1 * max(told)]
        panel.fill_between(line, [x * (1 - within) for x in line], [x * (1 + within) for x in line], color="#EEEEEE")
        panel.plot(line, line, color=GREY, linewidth=0.8)
        for model, marker, colour in zip(
            dict.fromkeys(row["model"] for row in result.rows), "os^", COLOURS, strict=False
        ):
            rows = [row for row in result.rows if row["model"] == model]
            x, y = ([row[name] / unit for row in rows] for name in (f"predicted_{kind}", kind))
            panel.plot(x, y, marker, color=colour, label=model)
            for row, at in zip(rows, zip(x, y, strict=True), strict=True):
                panel.annotate(row["cut"], at, xytext=(5, -4), **NEAR)
        panel.set_xlabel("predicted")
        panel.set_ylabel("measured")
        panel.set_title(title, fontsize=11)
        legend_below(panel, 2)
        tidy(panel, grid="y")
    save(figure, path)


def draw_partition(losses: dict[str, dict[str, float]], panel: Axes) -> None:
    """One partition: ``losses`` are the spreads of all models."""
    shown = [name for name in losses if name not in LINES and name != "before" and not name.startswith("local-only")]
    for place, name in enumerate(shown):
        panel.errorbar(losses[name]["median"], place, xerr=around([losses[name]]), fmt="o", color=BLUE, capsize=3)
        panel.annotate(f"{losses[name]['median']:.3f}", (losses[name]["max"], place), xytext=(6, -3), **NEAR)
    for name, (line, colour) in LINES.items():
        panel.axvline(losses[name]["median"], linestyle=line, color=colour, label=name)
    for place, way in enumerate(ALONE, len(shown)):
        each = [losses[name]["median"] for name in losses if name.startswith(f"{way}, client")]
        panel.plot(each, [place] * len(each), "s", color=ORANGE, markersize=5)
    labels = [*shown, *(f"{way}: each" for way in ALONE)]
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)  # the first on top, in panels that share the axis too
    panel.set_xlabel(f"{UNITS}, rows of all clients")
    legend_below(panel, 3)
    tidy(panel, grid="x")


def draw_timeline(result: Result, path: Path) -> None:
    """Who works and who waits in a training step, a panel a way, all on one scale. Raises StorageError."""
    figure = Figure(figsize=(11, 5.5), layout="constrained", facecolor="white")
    shown = 1.02 * min(lanes["step_s"] for lanes in result.drawn.values())
    panels = figure.subplots(len(result.drawn), 1, sharex=True)
    for panel, (name, lanes) in zip(panels, result.drawn.items(), strict=True):
        draw_lanes(lanes, panel)
        part = "all of it" if lanes["step_s"] <= shown else f"its first {shown:.1f} s"
        panel.set_title(f"{name}: a step of {lanes['step_s']:.2f} s, {part}", fontsize=11, loc="left")
    panels[-1].set_xlim(0, shown)
    panels[-1].set_xlabel("seconds from the step's beginning; client and trunk: height is the share of a core in use")
    save(figure, path)


def draw_lanes(lanes: dict[str, Any], panel: Axes) -> None:
    """One step: client, up, trunk, down, from top to bottom."""
    for place, (name, colour) in enumerate(LANES.items()):
        if name in ("up", "down"):
            spells = [(began, left - began) for began, left in lanes[name]]
            panel.broken_barh(spells, (place - 0.4, 0.8), color=colour)
        else:
            heights = [place + 0.4 - 0.8 * min(1.0, share) for share in lanes[name]]
            panel.stairs(heights, lanes["times"], baseline=place + 0.4, fill=True, color=colour)
    panel.set_yticks(range(len(LANES)), list(LANES))
    panel.set_ylim(len(LANES) - 0.5, -0.5)
    tidy(panel, grid="x")


def draw_scale(result: Result, path: Path) -> None:
    """Tokens a second by number of clients, together and as one whole model on their batches. Raises StorageError."""
    rows = [row for row in result.rows if "ratio" in row]
    clients = [row["clients"] for row in rows]
    figure = Figure(figsize=(6.5, 4.5), layout="constrained", facecolor="white")
    panel = figure.subplots()
    for kind, label, marker, colour in (("split", "split", "o", BLUE), ("whole", "whole model", "s", GREY)):
        rates = [row[f"{kind}_tokens_per_s"] for row in rows]
        medians = [rate["median"] for rate in rates]
        panel.errorbar(clients, medians, yerr=around(rates), marker=marker, color=colour, capsize=3, label=label)
    for row in rows:
        highest = max(row[f"{kind}_tokens_per_s"]["max"] for kind in ("split", "whole"))
        panel.annotate(f"{row['ratio']['median']:.2f}x", (row["clients"], highest), xytext=(0, 6), ha="center", **NEAR)
    panel.set_xscale("log", base=2)
    panel.set_xticks(clients, [str(number) for number in clients])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("clients, each with the same batch")
    panel.set_ylabel("tokens a second, all clients together")
    legend_below(panel, 2)
    tidy(panel, grid="y")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture. Raises StorageError."""
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", "Check the disk's free space.") from error


def by_mechanism(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each mechanism that was attacked, by recovery."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "recovery" in row:
            found.setdefault(row["mechanism"], []).append(row)
    return {name: sorted(part, key=lambda row: float(row["recovery"]["median"])) for name, part in found.items()}


def around(losses: list[dict[str, float]]) -> list[list[float]]:
    """Distance from each median down to the least and up to the greatest."""
    return [[loss["median"] - loss["min"] for loss in losses], [loss["max"] - loss["median"] for loss in losses]]
