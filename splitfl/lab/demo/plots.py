"""The demo's picture: curves of held-out loss for each client, and where every model ends.

Drawn without pyplot, so no window system is asked for. The colours are Okabe and Ito's, which colour-blind readers
tell apart; markers and labels say the same once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from splitfl.errors import StorageError
from splitfl.lab.demo.results import ENDS_ONLY, MERGED_ENDS, TOP_ONLY, DemoResult, alone

GREY, ORANGE, BLUE, GREEN = "#8C8C8C", "#E69F00", "#0072B2", "#009E73"
YELLOW, SKY, PURPLE = "#F0E442", "#56B4E9", "#CC79A7"
STYLES: dict[str, dict[str, Any]] = {
    "before": {"label": "before", "color": GREY},
    "local_only": {"label": "local-only", "color": ORANGE, "marker": "s"},
    ENDS_ONLY: {"label": "ends-only", "color": YELLOW},
    TOP_ONLY: {"label": "top-only", "color": SKY},
    MERGED_ENDS: {"label": "merged ends", "color": PURPLE},
    "federated": {"label": "federated", "color": BLUE, "marker": "o"},
    "centralised": {"label": "centralised", "color": GREEN, "marker": "^"},
}
CURVES = ("local_only", "centralised", "federated")  # the last lies on top
UNITS = "held-out loss (nats per token)"


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture as a PNG. Raises StorageError."""
    figure = Figure(figsize=(13, 9), layout="constrained", facecolor="white")
    figure.suptitle(
        "Three hospitals train one model, privacy mode measured: federated, and its alternatives",
        fontsize=15,
        fontweight="bold",
    )
    upper, lower = cast("list[SubFigure]", figure.subfigures(2, 1, height_ratios=[1.0, 1.15], hspace=0.06))
    draw_curves(result, upper.subplots(1, len(result.clients), sharey=True))
    own, union = lower.subplots(1, 2, width_ratios=[1.35, 1.0])
    draw_own(result, own)
    draw_union(result, union)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.25)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", "Check the disk's free space.") from error


def draw_curves(result: DemoResult, panels: Any) -> None:
    """A panel a client: held-out loss after each round."""
    records = result.settings["evaluation"]["records"]
    for client, panel in zip(result.clients, panels, strict=True):
        for kind in CURVES:
            losses = result.curves[kind][client]
            panel.plot(range(len(losses)), losses, linewidth=2, markersize=5.5, **STYLES[kind])
        panel.set_title(f"{client}: its own held-out notes", fontsize=11)
        panel.set_xlabel(f"rounds trained (measured on {records} records)")
        panel.set_xticks(range(len(result.curves["federated"][client])))
        tidy(panel, grid="y")
    panels[0].set_ylim(0, 1.08 * max(max(result.curves[kind][client]) for kind in CURVES for client in result.clients))
    panels[0].set_ylabel(UNITS)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(handles[::-1], labels[::-1], frameon=False, loc="upper right")


def draw_own(result: DemoResult, panel: Axes) -> None:
    """Bars by client: every model on that client's own held-out notes."""
    width = 0.125
    for number, (kind, style) in enumerate(STYLES.items()):
        losses = [result.own(model_of(kind, client), client) for client in result.clients]
        places = [group + (number - (len(STYLES) - 1) / 2) * width for group in range(len(losses))]
        bars = panel.bar(places, losses, width * 0.92, color=style["color"], label=style["label"])
        panel.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=2)
    panel.set_xticks(range(len(result.clients)), result.clients)
    panel.set_title("Each client's own held-out notes, all of them, after the last round", fontsize=11)
    panel.set_ylabel(UNITS)
    panel.margins(y=0.12)
    panel.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=1.2, fontsize=9)
    tidy(panel, grid="y")


def draw_union(result: DemoResult, panel: Axes) -> None:
    """Bars by model: on the held-out notes of all clients together."""
    each = [(kind, client) for kind in ("local_only", ENDS_ONLY, TOP_ONLY) for client in result.clients]
    shown = [("before", ""), *each, (MERGED_ENDS, ""), ("federated", ""), ("centralised", "")]
    names = [", ".join(filter(None, (client, STYLES[kind]["label"]))) for kind, client in shown]
    colours = [STYLES[kind]["color"] for kind, _ in shown]
    losses = [result.union(model_of(kind, client)) for kind, client in shown]
    bars = panel.barh(range(len(shown)), losses, 0.72, color=colours)
    panel.bar_label(bars, fmt="%.2f", fontsize=8.5, padding=3)
    panel.set_yticks(range(len(shown)), names, fontsize=8.5)
    panel.invert_yaxis()
    panel.set_title("Held-out notes of all three together", fontsize=11)
    panel.set_xlabel(UNITS)
    panel.margins(x=0.12)
    tidy(panel, grid="x")


def model_of(kind: str, client: str) -> str:
    """Which model ``kind`` is for ``client``, in :attr:`DemoResult.held_out`."""
    if kind in (ENDS_ONLY, TOP_ONLY):
        return alone(kind, client)
    return client if kind == "local_only" else kind


def tidy(panel: Axes, grid: Literal["x", "y"]) -> None:
    """Lines where they help, none where they do not."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0)


def legend_below(panel: Axes, columns: int) -> None:
    """Say what is drawn under the axis, where it hides nothing."""
    panel.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.13))
