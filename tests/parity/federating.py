"""A federation over real websockets for the oracles: the service in one thread, each client in its own."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gates import agree
from serving import ServiceThread

from client_model.link import Link
from client_model.participant import Event, Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What a run left: losses of each client's steps, closing reports, the coordinator and its state folder."""

    coordinator: Coordinator
    state: Path
    step_losses: dict[str, list[float]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


def exact_settings(**tables: Any) -> Federation:
    """fp32 on the wire, no clipping, constant step size, nothing frozen, unless said otherwise."""
    defaults: dict[str, Any] = {
        "batch": {"records": 4, "max_length": 24},
        "model": {"freeze_below": 0, "compute": "fp32"},
        "optimizer": {"schedule": "constant", "max_grad_norm": 0.0, "learning_rate": 1e-3},
        "wire": {"codec": "fp32"},
        "evaluation": {"held_out_fraction": 0.2, "records": 16, "every_rounds": 0},
    }
    merged = {name: {**defaults.get(name, {}), **table} for name, table in {**defaults, **tables}.items()}
    return parse_federation(merged, "the test")


def federate(
    model: Path, data: Mapping[str, Path], settings: Federation, folder: Path, cuts: Mapping[str, Cut] | None = None
) -> Outcome:
    """Run a whole federation over loopback and return what it left."""
    server = ServiceThread(model, settings, folder / "server")
    try:
        outcome = Outcome(server.coordinator, folder / "server")
        with ThreadPoolExecutor(len(data)) as pool:
            jobs = {
                name: pool.submit(take_part, name, path, server.url, folder / name, outcome, (cuts or {}).get(name))
                for name, path in data.items()
            }
            outcome.reports = {name: job.result(timeout=240) for name, job in jobs.items()}
        return outcome
    finally:
        server.stop()


def take_part(name: str, data: Path, url: str, folder: Path, outcome: Outcome, cut: Cut | None) -> dict[str, Any]:
    """One client from Hello to its report."""
    losses = outcome.step_losses.setdefault(name, [])

    def report(event: Event) -> None:
        if event.event == "step":
            losses.append(event.facts["loss"])

    bottom, top = (cut.n_bottom, cut.n_top) if cut else (-1, -1)
    link = Link(url, Hello(PROTOCOL_VERSIONS, name, n_bottom=bottom, n_top=top), say=lambda _: None)
    participant = Participant(name, data, ClientStore(folder), folder / "cache", CPU, report, accept=agree, plan=cut)
    try:
        return participant.run(link, link.open(), url)
    finally:
        link.close()
