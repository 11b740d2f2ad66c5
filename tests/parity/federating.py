"""A federation over real websockets for the oracles: the service in one thread, each client in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gates import agree
from serving import ServiceThread

from client_model.choices import Choices
from client_model.events import Event
from client_model.floor import Floor
from client_model.link import Link
from client_model.participant import Participant, PausedError
from client_model.resuming import first_words, open_journal
from client_model.store import ClientStore
from client_model.taking_part import say_goodbye
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut

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
    model: Path,
    data: Mapping[str, Path],
    settings: Federation,
    folder: Path,
    cuts: Mapping[str, Cut | Sequence[Cut]] | None = None,
) -> Outcome:
    """Run a whole federation over loopback and return what it left.

    A client with several cuts joins anew with the next one after each round, and keeps the last one.
    """
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


def take_part(
    name: str, data: Path, url: str, folder: Path, outcome: Outcome, cuts: Cut | Sequence[Cut] | None
) -> dict[str, Any]:
    """One client from its first Hello to its report."""
    starts: Sequence[Cut | None] = cuts if isinstance(cuts, Sequence) else [cuts]
    for cut in starts[:-1]:
        with suppress(PausedError):
            join(name, data, url, folder, outcome, cut, one_round=True)
    return join(name, data, url, folder, outcome, starts[-1], one_round=False)


def join(
    name: str, data: Path, url: str, folder: Path, outcome: Outcome, cut: Cut | None, *, one_round: bool
) -> dict[str, Any]:
    """One start of a client, as ``splitfl join`` makes it. Raises PausedError after ``one_round``."""
    losses = outcome.step_losses.setdefault(name, [])
    merged: list[int] = []

    def report(event: Event) -> None:
        if event.event == "step":
            losses.append(event.facts["loss"])
        if event.event == "round_durable":
            merged.append(event.facts["round"])

    store = ClientStore(folder)
    journal = open_journal(store, None, Choices(cut), floor=repr(Floor()), url=url)
    link = Link(url, first_words(name, store, Choices(cut), journal.head, url), journal=journal, say=lambda _: None)
    participant = Participant(name, data, store, folder / "cache", CPU, report, accept=agree, plan=Choices(cut))
    participant.stop = lambda: one_round and bool(merged)
    try:
        return participant.run(link, link.open(), url)
    except PausedError:
        say_goodbye(link, "interrupted")
        raise
    finally:
        link.close()
