"""How the federation's weights follow from a round: seven rules, each a pure function of one tensor.

A rule sees the tensor's value ``previous`` before the round, the ``average`` of the copies that came back
(``splitfl.federation.robust``), and what it remembers of that tensor from earlier rounds. So a merge never holds more
than one tensor of each client in memory. Everything is computed in float64; ``splitfl.federation.merging`` rounds.

A new rule is a subclass of ``Strategy`` and a row in ``STRATEGIES``. One that also changes the clients' gradients
returns a ``Correction`` (``splitfl.federation.drift``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from splitfl.config import Federation, Merge
from splitfl.errors import ConfigError
from splitfl.federation.drift import ControlVariates, Correction, Proximal

State = Mapping[str, Tensor]  # what is remembered of one tensor, by a name of ``state_names``


@dataclass(frozen=True)
class RoundFacts:
    """What a rule may know of the round: the sum of its local ``step_sizes``, how many clients ``contributed``, and
    how many have ever contributed, ``before`` this round and with it (``clients``)."""

    step_sizes: float = 1.0
    contributed: int = 1
    before: int = 1
    clients: int = 1


class Strategy(ABC):
    """A rule. ``uses`` names the fields of [merge] that it reads, ``state_names`` what it remembers of each tensor,
    ``sent_names`` the part of that which clients get beside the merged weights. ``weighs`` says what counts in the
    mean: label tokens, or every copy once."""

    uses: ClassVar[tuple[str, ...]] = ()
    state_names: ClassVar[tuple[str, ...]] = ()
    sent_names: ClassVar[tuple[str, ...]] = ()
    weighs: ClassVar[Literal["tokens", "clients"]] = "tokens"
    step_size: ClassVar[float] = 1.0  # where server_learning_rate is not set

    def __init__(self, merge: Merge) -> None:
        self.settings = merge
        self.rate = self.step_size if merge.server_learning_rate is None else merge.server_learning_rate

    @abstractmethod
    def merge(self, previous: Tensor, average: Tensor, state: State, facts: RoundFacts) -> tuple[Tensor, State]:
        """The tensor's next value, and what to remember of it. All float64, of one shape; nothing is changed in
        place. ``state`` is empty until a tensor is merged for the first time."""

    def correction(self) -> Correction | None:
        """What each client adds to its gradients; None = nothing."""
        return None

    def check(self, settings: Federation) -> None:  # noqa: B027  (most rules are right under all settings)
        """Raise ConfigError for settings under which the rule would be wrong."""


class FedAvg(Strategy):
    """x+ = sum_i (n_i / n) y_i: the average itself, n_i the label tokens of client i (McMahan et al. 2017,
    algorithm 1)."""

    def merge(self, previous: Tensor, average: Tensor, state: State, facts: RoundFacts) -> tuple[Tensor, State]:  # noqa: ARG002
        return average, {}


class FedProx(FedAvg):
    """FedAvg over clients that minimise f_i(y) + (mu / 2) |y - x|^2 (Li et al. 2020, algorithm 2)."""

    uses = ("proximal_mu",)

    def correction(self) -> Correction:
        return Proximal(self.settings.proximal_mu)

    def check(self, settings: Federation) -> None:
        rate, pull = settings.optimizer.rate_of_clients, settings.merge.proximal_mu
        if settings.optimizer.of_clients == "sgd" and pull * rate >= 2:
            raise ConfigError(
                f"merge.proximal_mu = {pull:g} with SGD steps of {rate:g}: each step overshoots the round's start",
                f"Set proximal_mu below {2 / rate:g}, where a step no longer does.",
            )


class Scaffold(Strategy):
    """Control variates against client drift (Karimireddy et al. 2020, algorithm 1, option II).

    Clients add c - c_i to each gradient (``drift.ControlVariates``). Here, with the average y of their copies:

        x+ = x + eta_g (y - x)        c+ = c + (|S| / N) ((x - y) / K - c)

    where c_i+ - c_i = (x - y_i) / K - c follows from what came up anyway, so c_i stays at home. K is the sum of the
    round's step sizes (the paper's K eta_l, under a schedule); a step that a client missed counts as a gradient of
    zero, and who missed all of them is in neither S nor N. N counts the clients that have ever contributed; when new
    ones come, whose c_i is zero, c is the mean over more.

    The average counts each client once, as the paper's does: c is the mean of the c_i, and the optimum that of the mean
    of the clients' losses, whatever their tokens. Weighted by tokens, y would be corrected by a c of another loss, and
    there would be no right optimum where cohorts are a part of the clients.

    It trusts everybody that it ever had. The c_i of a client that has left stays in c: of one that left with y = x + u,
    the gradients of those who stay add up to u / K at the end, instead of to zero.
    """

    uses = ("server_learning_rate",)
    state_names = ("control",)
    sent_names = ("control",)
    weighs = "clients"

    def merge(self, previous: Tensor, average: Tensor, state: State, facts: RoundFacts) -> tuple[Tensor, State]:
        control = state.get("control", torch.zeros_like(previous))
        moved = (previous - average) / facts.step_sizes - control
        control = (facts.before * control + facts.contributed * moved) / facts.clients
        return previous + self.rate * (average - previous), {"control": control}

    def correction(self) -> Correction:
        return ControlVariates()

    def check(self, settings: Federation) -> None:
        if settings.optimizer.of_clients != "sgd":
            raise ConfigError(
                f'merge.strategy = "scaffold" with "{settings.optimizer.of_clients}" at the clients: control variates '
                "are gradients, and the distance that adaptive steps go says nothing of those",
                'Set optimizer.client_name = "sgd", or another strategy.',
            )
        if settings.merge.aggregate != "mean" or settings.merge.clip_norm:
            raise ConfigError(
                'merge.strategy = "scaffold" with robust merging: the variates of clients and server would part',
                "Leave out merge.aggregate and merge.clip_norm, or set another strategy.",
            )
        if settings.rounds.staleness != "drop":
            raise ConfigError(
                'merge.strategy = "scaffold" with late updates: a variate would be of another round than its change',
                'Set rounds.staleness = "drop", or another strategy.',
            )
        if len(settings.bottoms) * len(settings.tops) > 1:
            raise ConfigError(
                'merge.strategy = "scaffold" where cuts may differ: the trunk\'s copy of a block has no variate',
                "Leave out model.min_* and model.max_*, or set another strategy.",
            )


class FedAvgM(Strategy):
    """Server momentum (Hsu et al. 2019): with d = y - x, m+ = beta m + d, x+ = x + eta m+."""

    uses = ("server_learning_rate", "server_momentum")
    state_names = ("momentum",)

    def merge(self, previous: Tensor, average: Tensor, state: State, facts: RoundFacts) -> tuple[Tensor, State]:  # noqa: ARG002
        momentum = state.get("momentum", torch.zeros_like(previous))
        momentum = self.settings.server_momentum * momentum + average - previous
        return previous + self.rate * momentum, {"momentum": momentum}


class Adaptive(Strategy):
    """The three of Reddi et al. 2021, algorithm 2: with d = y - x,

        m+ = beta_1 m + (1 - beta_1) d        x+ = x + eta m+ / (sqrt(v+) + tau)

    from m = 0 and v = tau^2; ``variance`` gives v+. eta is the distance that a coordinate moves in a round, about: its
    default is 0.01, the paper's choice for text. Whatever clients send, with FedAdam it is at most
    eta (1 - beta_1) / sqrt((1 - beta_2) (1 - beta_1^2 / beta_2)), by Cauchy and Schwarz over the rounds, and with
    FedAdagrad eta. Which way is not bounded, and v remembers a lie: docs/strategies.md.
    """

    uses: ClassVar[tuple[str, ...]] = ("server_learning_rate", "server_momentum", "server_beta2", "server_epsilon")
    state_names: ClassVar[tuple[str, ...]] = ("momentum", "variance")
    step_size = 0.01

    def merge(self, previous: Tensor, average: Tensor, state: State, facts: RoundFacts) -> tuple[Tensor, State]:  # noqa: ARG002
        change, tau = average - previous, self.settings.server_epsilon
        momentum = self.momentum(state.get("momentum", torch.zeros_like(change)), change)
        variance = self.variance(state.get("variance", torch.full_like(change, tau**2)), change.square())
        kept = {"momentum": momentum, "variance": variance}
        step = self.rate * momentum / (variance.sqrt() + tau)
        return previous + step, {name: kept[name] for name in self.state_names}

    def momentum(self, momentum: Tensor, change: Tensor) -> Tensor:
        """m+ from m and d."""
        beta = self.settings.server_momentum
        return beta * momentum + (1 - beta) * change

    @abstractmethod
    def variance(self, variance: Tensor, squared: Tensor) -> Tensor:
        """v+ from v and d^2."""


class FedAdagrad(Adaptive):
    """v+ = v + d^2; beta_1 = 0, as in the paper's experiments (Reddi et al. 2021, algorithm 2)."""

    uses = ("server_learning_rate", "server_epsilon")
    state_names = ("variance",)

    def momentum(self, momentum: Tensor, change: Tensor) -> Tensor:  # noqa: ARG002
        return change

    def variance(self, variance: Tensor, squared: Tensor) -> Tensor:
        return variance + squared


class FedYogi(Adaptive):
    """v+ = v - (1 - beta_2) d^2 sign(v - d^2) (Reddi et al. 2021, algorithm 2)."""

    def variance(self, variance: Tensor, squared: Tensor) -> Tensor:
        return variance - (1 - self.settings.server_beta2) * squared * torch.sign(variance - squared)


class FedAdam(Adaptive):
    """v+ = beta_2 v + (1 - beta_2) d^2 (Reddi et al. 2021, algorithm 2)."""

    def variance(self, variance: Tensor, squared: Tensor) -> Tensor:
        return self.settings.server_beta2 * variance + (1 - self.settings.server_beta2) * squared


#: merge.strategy -> its rule
STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
}
