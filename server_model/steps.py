"""What the compute queue keeps books on: forwards that wait, joint graphs, and the optimizer step in work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from torch import Tensor

from server_model.trunk import Graph, Rows


class MissedError(Exception):
    """The client is not, or no longer, part of the step it asks about."""


@dataclass(frozen=True)
class StepKey:
    """Round, step and micro-batch, each from 0."""

    round: int
    step: int
    micro: int


@dataclass(eq=False)
class Arrival:
    """A forward that waits for its turn."""

    client: str
    key: StepKey
    blocks: range
    rows: Rows
    label_tokens: int
    train: bool
    reply: asyncio.Future[Tensor]

    @property
    def tokens(self) -> int:
        return self.rows.hidden.shape[0] * self.rows.hidden.shape[1]


@dataclass(eq=False)
class Joint:
    """A joint forward whose gradients are still coming."""

    members: list[Arrival]
    tokens_held: int  # whose graphs are kept until the backward
    has_run: bool = False
    graph: Graph | None = None  # comes with the outputs, goes with the backward: it holds the activations
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    replies: dict[str, asyncio.Future[Tensor]] = field(default_factory=dict)
    backward_started: bool = False
    finished: bool = False

    @property
    def complete(self) -> bool:
        return all(member.client in self.gradients for member in self.members)


@dataclass(eq=False)
class StepWork:
    """One optimizer step in work: who takes part, which graphs wait, who has finished which micro-batch."""

    round: int
    step: int
    members: dict[str, int]  # client -> the micro-batches that it computes the step in
    joints: list[Joint] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)  # client -> finished micro-batches
    applying: bool = False
    timer: asyncio.TimerHandle | None = None

    def has_finished(self, client: str) -> bool:
        """Whether a member has all its micro-batches behind it."""
        return self.done.get(client, 0) >= self.members[client]
