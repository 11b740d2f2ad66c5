"""A simulation from its settings to its results folder.

    input/           the model and each client's rows (splitfl.lab.simulate.inputs)
    server/          the trunk service's state, as ``splitfl export --state`` takes it
    clients/NAME/    each client's state folder
    events.jsonl     what happened, as it happened
    results.json  rounds.csv  clients.csv  curves.png
    exported/        the trained model as a Hugging Face folder, unless every client has its own

Memory is bounded by the cohort, not by the number of clients; disk is not: every client keeps its two snapshots.
Durable is what a federation's server and clients make durable, so a run that was killed goes on from its last durable
round.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from server_model.coordinator import Coordinator
from server_model.exporting import export_state, trains_personal_weights
from splitfl.config import Federation
from splitfl.federation.rounds import draw_cohort
from splitfl.files import claimed, clear_unfinished
from splitfl.lab.federation import FederationEvent, Reporter, client_folder, run_together, server_folder
from splitfl.lab.memory import MemoryService
from splitfl.lab.simulate.history import EventLog, History
from splitfl.lab.simulate.inputs import Inputs, check_model, check_out, deal_rows, write_inputs
from splitfl.lab.simulate.settings import Simulation
from splitfl.lab.simulate.turns import TurnClient
from splitfl.split.modes import choose_device


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation left in ``folder``. ``groups`` counts each client's rows by group, ``seconds`` this start."""

    folder: Path
    simulation: Simulation
    history: History
    reports: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, int]]
    exported: Path | None
    seconds: float


def simulate(
    simulation: Simulation,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    report: Callable[[FederationEvent, History], None] = lambda *_: None,
) -> SimulationResult:
    """Run a simulation in the folder ``out``, which is new, or with ``resume`` may hold one that was interrupted.

    With privacy off the same settings give the same weights, to the bit, on the same machine, interrupted or not, as
    ``splitfl.lab.federation.run_federation`` does. ``report`` hears every event as it happens, one at a time, and how
    things stand. With many clients ``torch.set_num_threads(1)`` is fastest.

    Raises ConfigError, DataError or CheckpointError for settings, data or a model that cannot be used, and ConfigError
    for an ``out`` that is not free, all of them before anything is written; and whatever the first failing
    client or the service raised.
    """
    began = time.monotonic()
    check_out(out, simulation, resume=resume)
    place, inputs = choose_device(device), Inputs(simulation, out / "input")
    check_model(simulation, place)
    dealt = None if inputs.folder.exists() else deal_rows(simulation)
    with claimed(out, "--out"):
        clear_unfinished(out)
        if dealt is not None:
            write_inputs(inputs, dealt)
        log = EventLog(out / "events.jsonl")

        def hear(told: FederationEvent) -> None:
            log.write(told)
            report(told, log.history)

        reports = federate(inputs, out, place, Reporter(hear), resume=resume)
        shutil.rmtree(out / ".cache", ignore_errors=True)
        exported = export(simulation.federation, out)
    seconds = time.monotonic() - began
    return SimulationResult(out, simulation, log.history, reports, inputs.groups(), exported, seconds)


def federate(
    inputs: Inputs, out: Path, device: torch.device, reporter: Reporter, *, resume: bool
) -> dict[str, dict[str, Any]]:
    """Run the rounds that are left; returns the clients' closing reports."""
    settings, names = inputs.simulation.federation, inputs.simulation.partition.names
    coordinator = Coordinator(
        inputs.model, settings, server_folder(out), device=device, resume=resume, report=reporter.of_service
    )
    coordinator.rounds.machine.present.update(names)  # no round opens before all of them ask for one
    slots = threading.Semaphore(len(draw_cohort(settings, 0, set(names))))
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    with MemoryService(coordinator) as service:
        reporter.stop = service.fail
        for number, name in enumerate(names):
            state, cache, hear = client_folder(out, name), out / ".cache" / name, reporter.of_client(name)
            cut = inputs.simulation.cut_of(number)
            client = TurnClient(name, inputs.data(name), state, cache, device, hear, cut)
            client.join(service)
            jobs[name] = partial(client.take_part, slots)
        return run_together(service, jobs)


def export(settings: Federation, out: Path) -> Path | None:
    """Write the trained model; None where each client has its own, or where the agreement lets nobody export it."""
    if trains_personal_weights(settings) or not settings.agreement.exporters:
        return None
    folder = out / "exported"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, perhaps half written
    export_state(server_folder(out), folder, client=None, dtype="float32", exporter=settings.agreement.exporters[0])
    return folder
