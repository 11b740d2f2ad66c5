"""The demo from nothing to a result: notes, base model, federation, baselines, one stage after the other.

This process orchestrates and holds no model: everything that computes is a process of its own, started through
:mod:`splitfl.lab.demo.children`. The federation is what anybody would start by hand, ``splitfl serve`` and
``splitfl join``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from server_model.invitations import invite
from splitfl.data.notes import write_notes
from splitfl.errors import ConfigError, StorageError
from splitfl.lab.demo.children import Children, Event
from splitfl.lab.demo.results import ENDS_ONLY, MERGED_ENDS, TOP_ONLY, DemoResult, Measured, alone
from splitfl.lab.demo.scale import CLIENTS, PUBLIC, DemoFolder, DemoScale
from splitfl.lab.demo.views import FederationView, Screen, TrainingView, View

INVITATION_S = 3600.0
COMMAND, WORKER = "splitfl.cli", "splitfl.lab.demo.worker"
TRUNK = "trunk"
WAYS = {ENDS_ONLY: "ends-only", TOP_ONLY: "top-only", MERGED_ENDS: "merged ends"}


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Demo:
    """One demo in a new folder. ``run`` gives its result."""

    folder: DemoFolder
    scale: DemoScale
    seed: int
    device: str
    screen: Screen
    cores: int = field(default_factory=usable_cores)
    held_out: dict[str, dict[str, Measured]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    peak_rss: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> DemoResult:
        """All stages. Raises ConfigError for a folder in use, and SplitFLError when a process fails."""
        self._make_folder()
        with self._stage("notes", f"Writing notes: {self.scale.notes:,} for each of {', '.join(CLIENTS)}"):
            self._write_notes()
        with self._stage(
            "base model", f"Base model and its narrow release, from {self.scale.public_notes:,} public notes"
        ):
            self._make_base()
        with self._stage("federation", "Federation: a trunk service and three clients, four processes, TLS"):
            self._federate()
        with self._stage(
            "baselines", "Baselines: each client alone in three ways, and all notes in one place; measuring"
        ):
            self._train_baselines()
        return DemoResult(
            clients=CLIENTS,
            held_out=self.held_out,
            curves=self.curves,
            reports=self.reports,
            peak_rss=self.peak_rss,
            parameters=self.parameters,
            seconds=self.seconds,
            settings=self.scale.federation(self.seed).model_dump(mode="json"),
            adapted_steps=self.scale.ends_steps + self.scale.adapt_steps,
        )

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        self.screen.stage(title)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def _make_folder(self) -> None:
        path = self.folder.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ConfigError(f"{path} is not empty", "Name a new folder with --out.")
            self.folder.remember(self.scale, self.seed)
        except OSError as error:
            raise StorageError(
                f"cannot write to {path}: {error.strerror or error}", "Name another folder with --out."
            ) from error

    def _write_notes(self) -> None:
        write_notes(self.folder.notes(PUBLIC), PUBLIC, self.scale.public_notes, self.seed)
        for name in CLIENTS:
            write_notes(self.folder.notes(name), name, self.scale.notes, self.seed)

    def _make_base(self) -> None:
        steps = {"base": self.scale.base_steps, "adaptation": self.scale.ends_steps + self.scale.adapt_steps}
        with self._children() as children:
            self._start_worker(children, "base", self.cores)
            self._follow(children, TrainingView({"base": "base model", "adaptation": "adaptation"}, steps, lines=5))

    def _federate(self) -> None:
        """``splitfl serve``, and once it listens an invitation and ``splitfl join`` for each client."""
        folder = self.folder
        with self._children() as children:
            serving = ("--state", folder.trunk, "--federation", folder.federation, "--listen", "127.0.0.1:0")
            computing = ("--device", self.device, "--threads", self.cores)
            children.start(TRUNK, COMMAND, "serve", folder.published, *serving, *computing, "--json")
            view = FederationView(CLIENTS, self.scale.rounds, self.scale.local_steps)
            self._follow(children, view)
            self.peak_rss = children.peak_rss()
        losses = {name: report["held_out_losses"] for name, report in self.reports.items()}
        self.curves["federated"] = {name: [point["loss"] for point in losses[name]] for name in CLIENTS}

    def _join(self, children: Children, agreement: str) -> None:
        threads = max(1, self.cores // len(CLIENTS))
        for name in CLIENTS:
            home = self.folder.client(name)
            places = ("--data", self.folder.notes(name), "--state", home / "state", "--cache", home / "cache")
            computing = ("--device", self.device, "--threads", threads, "--plan", "federation")
            consent = ("--accept", agreement, "--key", home / "key", "--privacy", "measured")
            invitation = invite(self.folder.trunk, name, valid_s=INVITATION_S)
            children.start(name, COMMAND, "join", invitation, *places, *consent, *computing, "--json")

    def _train_baselines(self) -> None:
        labels = {name: f"{name} alone" for name in CLIENTS} | {"centralised": "all notes in one place"}
        labels |= {alone(kind, name): f"{name}, {WAYS[kind]}" for name in CLIENTS for kind in WAYS}
        steps = dict.fromkeys(labels, self.scale.rounds * self.scale.local_steps)
        with self._children() as children:
            for task in ("centralised", "local-only", "alone", "merged"):
                self._start_worker(children, task, max(1, self.cores // 2))
            self._follow(children, TrainingView(labels, steps, lines=4))

    def _children(self) -> Children:
        return Children(self.folder.logs)

    def _start_worker(self, children: Children, task: str, threads: int) -> None:
        children.start(task, WORKER, task, self.folder.path, threads, self.device)

    def _follow(self, children: Children, view: View) -> None:
        self.screen.follow(children.events(), view, lambda name, event: self._take(children, name, event))

    def _take(self, children: Children, name: str, event: Event) -> None:
        """Keep what an event says, and start the clients when the trunk listens."""
        match event.get("event"):
            case "listening":
                self._join(children, event["agreement"])
            case "storage_error":  # the trunk would wait for room; a demo need not
                raise StorageError(
                    f"the trunk cannot write its state: {event['error']}", "Start again elsewhere: --out."
                )
            case "parameters":
                self.parameters = {part: event[part] for part in ("bottom", "trunk", "top")}
            case "evaluation" if "model" in event:  # a baseline's; the clients' are in their reports
                kind = "centralised" if event["model"] == "centralised" else "local_only"
                self.curves.setdefault(kind, {}).setdefault(event["client"], []).append(event["loss"])
            case "held_out":
                losses = event["losses"].items()
                self.held_out[event["model"]] = {client: Measured(**loss) for client, loss in losses}
        if "report" in event:
            self.reports[name] = event["report"]
