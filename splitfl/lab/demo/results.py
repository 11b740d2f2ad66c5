"""What one demo found: losses, curves, traffic, memory, and the JSON object that ``splitfl demo --json`` ends with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

ENDS_ONLY, TOP_ONLY = "ends_only", "top_only"  # what a client can do with the published model, alone
MERGED_ENDS = "merged_ends"  # what merging gives by itself: no record leaves, tops do


def alone(kind: str, client: str) -> str:
    """The name of what ``client`` trained alone."""
    return f"{client}/{kind}"


class Measured(NamedTuple):
    """A summed loss in nats and the label tokens that it was summed over."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / max(1, self.tokens)


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(50.0, loss))


@dataclass(frozen=True)
class DemoResult:
    """All figures of one demo.

    ``held_out``: model -> client whose held-out notes it was measured on -> loss. Models are ``before``,
    ``published``, ``federated``, ``merged_ends``, ``centralised``, each client's name for the whole model that it would
    train alone, and
    :func:`alone` of it for what it could do with the published one. ``curves``: ``federated``,
    ``local_only`` and ``centralised`` -> client -> held-out loss before the first round and after each, on
    ``curve_records`` records. ``reports``: what each client said at its end. ``parameters``: of ``bottom``, ``trunk``,
    ``top``. ``adapted_steps``: of the publisher, beyond the base model's. ``seconds``: of each stage.
    """

    clients: tuple[str, ...]
    held_out: Mapping[str, Mapping[str, Measured]]
    curves: Mapping[str, Mapping[str, list[float]]]
    reports: Mapping[str, Mapping[str, Any]]
    peak_rss: Mapping[str, int]
    parameters: Mapping[str, int]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    adapted_steps: int

    def own(self, model: str, client: str) -> float:
        """Loss of ``model`` on what ``client`` held out."""
        return self.held_out[model][client].mean

    def union(self, model: str) -> float:
        """Loss of ``model`` over the held-out notes of all clients together."""
        return union(self.held_out[model].values()).mean

    @property
    def best_local_only(self) -> str:
        """The client whose own model does best on the union."""
        return min(self.clients, key=self.union)

    def own_mean(self, kind: str) -> float:
        """Mean over clients of the loss on their own held-out notes. ``kind``: alone or for all."""
        each = kind in (ENDS_ONLY, TOP_ONLY)
        return fmean(self.own(alone(kind, client) if each else kind, client) for client in self.clients)

    @property
    def splitting_pays(self) -> bool:
        """Whether the federated model beats, on the clients' own held-out notes, all that leaks less."""
        return self.own_mean("federated") < min(map(self.own_mean, (ENDS_ONLY, TOP_ONLY, MERGED_ENDS)))

    @property
    def federated_wins(self) -> bool:
        """Whether the federated model beats every local-only one on the union."""
        return self.union("federated") < self.union(self.best_local_only)

    @property
    def stated_privacy(self) -> Mapping[str, Any]:
        """The privacy section of the client whose activations tell most."""
        sections: list[Mapping[str, Any]] = [self.reports[client]["privacy"] for client in self.clients]
        epsilons = [section["epsilon_activations"] for section in sections]
        return sections[max(range(len(sections)), key=lambda n: math.inf if epsilons[n] is None else epsilons[n])]

    def summary(self, picture: str) -> dict[str, Any]:
        """The object of ``splitfl demo --json``: losses in nats per token, everything else in bytes."""
        privacy = self.stated_privacy
        return {
            "clients": {
                client: {
                    "before": self.own("before", client),
                    "local_only": self.own(client, client),
                    "federated": self.own("federated", client),
                    "centralised": self.own("centralised", client),
                    ENDS_ONLY: self.own(alone(ENDS_ONLY, client), client),
                    TOP_ONLY: self.own(alone(TOP_ONLY, client), client),
                    MERGED_ENDS: self.own(MERGED_ENDS, client),
                }
                for client in self.clients
            },
            "union": {
                "before": self.union("before"),
                "local_only": {client: self.union(client) for client in self.clients},
                "federated": self.union("federated"),
                "centralised": self.union("centralised"),
                ENDS_ONLY: {client: self.union(alone(ENDS_ONLY, client)) for client in self.clients},
                TOP_ONLY: {client: self.union(alone(TOP_ONLY, client)) for client in self.clients},
                MERGED_ENDS: self.union(MERGED_ENDS),
            },
            "bytes": {client: self.traffic(client) for client in self.clients},
            "peak_rss": dict(self.peak_rss),
            "privacy": {
                "mode": privacy["mode"],
                "statement": privacy["statement"],
                "stayed": privacy["stayed"],
                "parties": privacy["parties"],
                "left": {client: self.reports[client]["privacy"]["left"] for client in self.clients},
            },
            "picture": picture,
        }

    def traffic(self, client: str) -> dict[str, int]:
        """Bytes that ``client`` sent and received on its link, all of it."""
        counted = self.reports[client]["bytes"]
        return {"sent": counted["bytes_sent"], "received": counted["bytes_received"]}


def union(losses: Iterable[Measured]) -> Measured:
    """Losses over several sets, each token counted once."""
    parts = list(losses)
    return Measured(sum(part.total for part in parts), sum(part.tokens for part in parts))
