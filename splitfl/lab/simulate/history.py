"""What happened in a simulation, kept as it happens: ``events.jsonl``, a line an event, read again by --resume.

A round that a kill cut short happens twice. It is the same round both times, so what is told later of the same step
or the same measurement takes the place of what was told before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from splitfl.errors import StorageError
from splitfl.files import storage_errors
from splitfl.lab.federation import FederationEvent

KEPT = ("round_open", "step", "evaluation", "round_durable")


class HeldOut(NamedTuple):
    """A client's held-out loss in nats per token, and the label tokens that it is the mean over."""

    loss: float
    tokens: int


class Traffic(NamedTuple):
    """Bytes on the links."""

    sent: int
    received: int


class History:
    """Cohorts, losses and traffic by round; rounds count from 0, ``held_out`` by the rounds behind the weights."""

    def __init__(self) -> None:
        self.cohorts: dict[int, list[str]] = {}
        self.losses: dict[int, dict[tuple[str, int], float]] = {}  # round -> (client, step) -> training loss
        self.held_out: dict[int, dict[str, HeldOut]] = {}
        self.traffic: dict[int, dict[str, Traffic]] = {}
        self.durable = -1

    def take(self, client: str, event: str, facts: Mapping[str, Any]) -> None:
        """Count an event in; those that are not in ``KEPT`` say nothing here. ``client`` "" is the trunk service."""
        round_ = facts.get("round", -1)
        match event:
            case "round_open":
                self.cohorts[round_] = list(facts["cohort"])
            case "step":
                self.losses.setdefault(round_, {})[client, facts["step"]] = facts["loss"]
            case "evaluation":
                self.held_out.setdefault(round_, {})[client] = HeldOut(facts["loss"], facts["tokens"])
            case "round_durable" if client:
                traffic = Traffic(facts["bytes_sent"], facts["bytes_received"])
                self.traffic.setdefault(round_, {})[client] = traffic
            case "round_durable":
                self.durable = round_

    def training_loss(self, round_: int) -> float | None:
        """Mean over the steps of a round, in nats per token."""
        losses = self.losses.get(round_, {})
        return fmean(losses.values()) if losses else None

    def held_out_loss(self, rounds: int) -> float | None:
        """Of the weights after so many rounds: mean over the held-out tokens of the clients that measured it."""
        measured = self.held_out.get(rounds, {}).values()
        tokens = sum(one.tokens for one in measured)
        return sum(one.loss * one.tokens for one in measured) / tokens if tokens else None

    def total_traffic(self, round_: int) -> Traffic:
        """Of all clients in a round; of a client that a kill cut short behind the merge it is not known."""
        each = self.traffic.get(round_, {}).values()
        return Traffic(sum(one.sent for one in each), sum(one.received for one in each))


class EventLog:
    """``events.jsonl`` and the history that it tells."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier start has written. Raises StorageError."""
        self.history = History()
        self._path = path
        for line in whole_lines(path):
            self.history.take(line["client"], line["event"], line)

    def write(self, told: FederationEvent) -> None:
        """Keep an event. Raises StorageError."""
        if told.event not in KEPT:
            return
        line = json.dumps({"client": told.client, "event": told.event, **told.facts})
        with storage_errors(self._path), self._path.open("a") as file:
            file.write(line + "\n")
        self.history.take(told.client, told.event, told.facts)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log; one that a kill left half written is cut off. Raises StorageError."""
    if not path.exists():
        return
    with storage_errors(path):
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            path.write_bytes(whole)
    try:
        yield from map(json.loads, whole.splitlines())
    except ValueError as error:
        raise StorageError(f"{path} cannot be read", "Start again in a new --out.") from error
