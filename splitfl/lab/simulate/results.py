"""A simulation's figures as tables: one JSON object and two CSV files."""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfl.errors import StorageError
from splitfl.files import write_file
from splitfl.lab.simulate.inputs import check_out
from splitfl.lab.simulate.run import SimulationResult
from splitfl.lab.simulate.settings import Simulation

Row = dict[str, Any]
RESULTS = "results.json"

ELSEWHERE = ("groups", "held_out_losses", "baselines", "privacy")  # of a client's row: too deep for a cell as they are


def write_results(result: SimulationResult) -> Row:
    """Write ``rounds.csv``, ``clients.csv`` and, last, ``results.json``: with it a simulation is finished.

    Returns what it holds. Raises StorageError.
    """
    everything = {**summary(result), "settings": result.simulation.model_dump(mode="json"), "clients": clients(result)}
    for name, rows in (("rounds.csv", rounds(result)), ("clients.csv", [flat(row) for row in clients(result)])):
        write_file(result.folder / name, table(rows).encode())
    write_file(result.folder / RESULTS, (json.dumps(everything, indent=2, sort_keys=True) + "\n").encode())
    return everything


def read_results(simulation: Simulation, out: Path) -> Row | None:
    """The results in ``out``, if it holds this very simulation and it is finished.

    Raises ConfigError where ``out`` holds something else, StorageError for results that cannot be read.
    """
    if not (out / RESULTS).exists():
        return None
    check_out(out, simulation, resume=True)
    try:
        found: Row = json.loads((out / RESULTS).read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{out / RESULTS} cannot be read", "Delete it, and add --resume to have it anew.") from error
    return found


def summary(result: SimulationResult) -> Row:
    """What ``splitfl simulate --json`` prints. Losses are in nats per token."""
    last = [one.loss for one in result.history.held_out.get(result.simulation.federation.rounds.count, {}).values()]
    each = {"best": min(last), "mean": sum(last) / len(last), "worst": max(last)} if last else None
    bytes_ = [report["bytes"] for report in result.reports.values()]
    return {
        "folder": str(result.folder),
        "exported": None if result.exported is None else str(result.exported),
        "rounds": rounds(result),
        "clients_held_out_loss": each,
        "bytes": {way: sum(one[f"bytes_{way}"] for one in bytes_) for way in ("sent", "received")},
        "seconds": result.seconds,
        "peak_rss": peak_rss(),
    }


def rounds(result: SimulationResult) -> list[Row]:
    """A row for the weights after each round, the first one for those before; ``clients`` made them."""
    history, count = result.history, result.simulation.federation.rounds.count
    return [
        {
            "round": done,
            "clients": len(history.cohorts.get(done - 1, ())),
            "training_loss": history.training_loss(done - 1),
            "held_out_loss": history.held_out_loss(done),
            "held_out_clients": len(history.held_out.get(done, ())),
            "bytes_sent": history.total_traffic(done - 1).sent,
            "bytes_received": history.total_traffic(done - 1).received,
        }
        for done in range(count + 1)
    ]


def clients(result: SimulationResult) -> list[Row]:
    """A row for each client."""
    return [client_row(result, name, report) for name, report in sorted(result.reports.items())]


def client_row(result: SimulationResult, name: str, report: Mapping[str, Any]) -> Row:
    measured = {done: held[name].loss for done, held in sorted(result.history.held_out.items()) if name in held}
    return {
        "client": name,
        "cut": report["cut"],
        "rows": sum(result.groups[name].values()),
        "groups": {group: count for group, count in sorted(result.groups[name].items()) if group},
        "rounds_taken": report["rounds_taken"],
        "held_out_losses": measured,
        "first_held_out_round": min(measured, default=None),
        "bytes_sent": report["bytes"]["bytes_sent"],
        "bytes_received": report["bytes"]["bytes_received"],
        "uncounted_starts": report["uncounted_starts"],
        "baselines": report["baselines"],
        "privacy": report["privacy"],
    }


def flat(row: Row) -> Row:
    """A client's row for a CSV: groups in one cell, the first and the last held-out loss, a cell for each baseline."""
    losses = list(row["held_out_losses"].values())
    cells = {name: value for name, value in row.items() if name not in ELSEWHERE}
    cells["groups"] = " ".join(f"{group}:{count}" for group, count in row["groups"].items())
    cells["first_held_out_loss"], cells["last_held_out_loss"] = (losses[0], losses[-1]) if losses else (None, None)
    baselines = row["baselines"] or {}
    names = {"ends_only": "ends_only", "top_only": "top_only", "baseline_steps": "steps"}
    return cells | {cell: baselines.get(name) for cell, name in names.items()}


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys, as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def peak_rss() -> int:
    """The most memory that this process has had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
