"""The audit as a picture: recovery of each attack with its interval, baselines below in grey."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from splitfl.errors import StorageError
from splitfl.lab.audit.report import AuditReport
from splitfl.lab.demo.plots import BLUE, GREY, ORANGE, tidy


def draw(report: AuditReport, path: Path) -> None:
    """Write a PNG. Raises StorageError."""
    rows = [*report.attacks, *report.baselines]
    colours = [ORANGE, *[BLUE] * (len(report.attacks) - 1), *[GREY] * len(report.baselines)]
    values = [row.recovery.value for row in rows]
    below = [max(0.0, row.recovery.value - row.recovery.low) for row in rows]
    above = [max(0.0, row.recovery.high - row.recovery.value) for row in rows]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained", facecolor="white")
    panel = figure.subplots()
    panel.barh(range(len(rows)), values, 0.7, color=colours, xerr=[below, above], error_kw={"capsize": 3})
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.02)
    panel.set_xlabel(f"share of {report.tokens} tokens recovered (95 % intervals over {report.records} records)")
    panel.set_title(report.statement, fontsize=10)
    tidy(panel, grid="x")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", "Check the disk's free space.") from error
