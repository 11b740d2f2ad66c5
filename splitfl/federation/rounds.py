"""The rounds of a federation as a pure state machine: events in, actions out, time an input.

A round opens when at least ``min_clients`` wait and nobody who has been there before is still on its way; a
newcomer that is still fetching its ends holds nobody up. A cohort is drawn from those who wait. The round is
merged when every member that has not left has sent its update, or at the deadline: with whatever is there, but where
somebody may lie with ``min_clients`` updates at least, so that nobody decides alone by being early. As long a deadline
runs between rounds, from when enough clients wait: then the round opens without those who are still on their way. An
update that missed its deadline is dropped, or counts in the next merge at a discount, unless its client has sent a
newer one by then.
It knows names and numbers, no weights and no sockets.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, field
from enum import Enum

from splitfl.config import Federation
from splitfl.errors import RefusedError


class Phase(Enum):
    """Where the federation stands."""

    GATHERING = "gathering"  # waiting for clients
    TRAINING = "training"  # a round is open
    MERGING = "merging"  # the owner merges and makes it durable
    FINISHED = "finished"


@dataclass(frozen=True)
class OpenRound:
    """Tell ``cohort`` to train ``round``."""

    round: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class LateUpdate:
    """``client`` has sent its update of ``round`` after that round was merged. If ``kept`` the next merge takes it,
    unless this client sends one for that in time."""

    client: str
    round: int
    kept: bool


@dataclass(frozen=True)
class Discounted:
    """A late update in a merge: its weight is its label tokens times ``discount``."""

    client: str
    round: int  # that it was trained in
    discount: float


@dataclass(frozen=True)
class MergeRound:
    """Merge the updates of ``contributors`` and the ``late`` ones, make the result durable, then call ``merged``."""

    round: int
    contributors: tuple[str, ...]
    late: tuple[Discounted, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The federation has ended after ``round``."""

    round: int


Action = OpenRound | LateUpdate | MergeRound | Finish


@dataclass
class RoundMachine:
    """``round`` is the one that is open or opens next. ``settings`` are the federation's."""

    settings: Federation
    round: int = 0
    phase: Phase = Phase.GATHERING
    present: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    cohort: set[str] = field(default_factory=set)
    updates: dict[str, int] = field(default_factory=dict)  # client -> label tokens
    owed: dict[str, int] = field(default_factory=dict)  # client -> the round whose deadline it missed
    late: dict[str, int] = field(default_factory=dict)  # client -> its update's round; the next merge may take it
    since: float | None = None  # when the deadline began to run: the round opened, or enough clients waited for it

    def __post_init__(self) -> None:
        if self.round >= self.settings.rounds.count:
            self.phase = Phase.FINISHED

    def leave(self, client: str, now: float) -> list[Action]:
        """A client has gone for good (said goodbye, or its grace has run out); its update, if sent, still counts."""
        self.present.discard(client)
        self.waiting.discard(client)
        self.owed.pop(client, None)
        if client not in self.updates:
            self.cohort.discard(client)
        return self._advance(now)

    def wait(self, client: str, now: float) -> list[Action]:
        """A client asks for its next round."""
        self.present.add(client)
        if client in self.cohort and client not in self.updates:
            self.cohort.discard(client)  # it came back without its state: it cannot finish this round
        self.owed.pop(client, None)
        self.waiting.add(client)
        return self._advance(now)

    def update(self, client: str, round_: int, tokens: int, now: float) -> list[Action]:
        """A client has sent its weights after ``round_``.

        Raises RefusedError for a round that this client is not in, and for a second update of one that it is in.
        """
        if self.owed.get(client) == round_:
            return [self._late(client, self.owed.pop(client))]
        if self.phase is not Phase.TRAINING or round_ != self.round or client not in self.cohort:
            raise RefusedError(
                f"an update for round {round_} from {client!r}, but round {self.round} is {self.phase.value}",
                "Ask for the next round.",
                code="wrong_round",
            )
        if client in self.updates:
            raise RefusedError("this client's update has come already", "Ask for the next round.", code="wrong_round")
        self.updates[client] = tokens
        return self._advance(now)

    def _late(self, client: str, round_: int) -> LateUpdate:
        rounds = self.settings.rounds
        next_merge = self.round + (self.phase is Phase.MERGING)
        fresh_enough = next_merge - round_ <= rounds.max_staleness and next_merge < rounds.count
        kept = rounds.staleness == "polynomial" and fresh_enough
        if kept:
            self.late[client] = round_
        return LateUpdate(client, round_, kept)

    def merged(self, now: float) -> list[Action]:
        """The round is merged and durable."""
        self.phase = Phase.GATHERING
        self.round += 1
        self.cohort, self.updates = set(), {}
        if self.round >= self.settings.rounds.count:
            self.phase = Phase.FINISHED
            return [Finish(self.round - 1)]
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        return self._advance(now)

    def deadline(self) -> float | None:
        """When ``tick`` should be called at the latest, or None."""
        limit = self.settings.rounds.deadline_s
        return self.since + limit if limit and self.since is not None else None

    def awaited(self) -> set[str]:
        """Who owes the open round an update, or is still on its way to the next one."""
        if self.phase is Phase.TRAINING:
            return self.cohort - self.updates.keys()
        return self.present - self.waiting if self.phase is Phase.GATHERING else set()

    def missing(self) -> int:
        """How many more clients a round needs to open."""
        least = max(1, self.settings.rounds.min_clients)
        return max(0, least - len(self.present)) if self.phase is Phase.GATHERING else 0

    def _advance(self, now: float) -> list[Action]:
        if self.phase is Phase.GATHERING:
            return self._open(now)
        if self.phase is Phase.TRAINING:
            return self._close(now)
        return []

    def _open(self, now: float) -> list[Action]:
        if len(self.waiting) < self.settings.rounds.min_clients:
            self.since = None
            return []
        self.since = now if self.since is None else self.since
        if self._is_late(now):
            self.present &= self.waiting  # nobody waits for who is still on its way, until it asks
        if not self.present <= self.waiting:
            return []
        cohort = draw_cohort(self.settings, self.round, self.waiting)
        self.phase, self.cohort, self.updates, self.since = Phase.TRAINING, set(cohort), {}, now
        self.waiting -= self.cohort
        return [OpenRound(self.round, cohort)]

    def _close(self, now: float) -> list[Action]:
        if not self.cohort:  # everybody left: nothing to merge, the same round opens again
            self.phase, self.since = Phase.GATHERING, None
            return self._open(now)
        enough_at_deadline = len(self.updates) >= self._least_at_deadline()
        if self.cohort <= self.updates.keys() or (self._is_late(now) and enough_at_deadline):
            self.phase, self.since = Phase.MERGING, None
            missed = self.cohort - self.updates.keys()
            self.present -= missed  # nobody waits for who was late, until it asks again
            self.owed |= dict.fromkeys(missed, self.round)
            return [MergeRound(self.round, tuple(sorted(self.updates)), self._take_late())]
        return []

    def _is_late(self, now: float) -> bool:
        deadline = self.deadline()
        return deadline is not None and now >= deadline

    def _least_at_deadline(self) -> int:
        """The bounds of robust averages are those of so many copies; a mean has none to lose."""
        return 1 if self.settings.merge.aggregate == "mean" else self.settings.rounds.min_clients

    def _take_late(self) -> tuple[Discounted, ...]:
        exponent = self.settings.rounds.staleness_exponent
        late, self.late = self.late, {}
        taken = sorted((name, old) for name, old in late.items() if name not in self.updates)  # nobody counts twice
        return tuple(Discounted(name, old, discount(self.round - old, exponent)) for name, old in taken)


def discount(staleness: int, exponent: float) -> float:
    """Weight of an update that is ``staleness`` rounds late, beside 1 for one in time: (1 + s)^-a.

    The polynomial of FedAsync (Xie et al. 2019, section 5.2).
    """
    return float((1 + staleness) ** -exponent)


def draw_cohort(settings: Federation, round_: int, waiting: set[str]) -> tuple[str, ...]:
    """Draw the round's cohort from the names that wait: seeded, without the order in which they came."""
    names = sorted(waiting)
    size = max(1, settings.rounds.min_clients, math.ceil(settings.rounds.client_fraction * len(names)))
    digest = hashlib.sha256(f"{settings.seed}/cohort/{round_}".encode()).digest()
    return tuple(sorted(random.Random(digest).sample(names, min(size, len(names)))))
