"""Strategies where the answer is known: client i minimises (y - b_i)' A_i (y - b_i) / 2, by plain gradient steps.

Everything but the gradient is the product's own: the optimizer of a part, the correction at the client, the merger.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from splitfl.config import Merge
from splitfl.federation.drift import Correction
from splitfl.federation.merging import Merger
from splitfl.federation.robust import Contribution
from splitfl.federation.strategies import STRATEGIES, RoundFacts
from splitfl.split.optimizer import OptimizerSpec, PartOptimizer

SIZE, CLIENTS, STEPS, RATE = 3, 4, 10, 0.1
SGD = OptimizerSpec("sgd", weight_decay=0.0, betas=(0.9, 0.999), max_grad_norm=0.0)


@dataclass(frozen=True)
class Quadratics:
    """Clients that differ in curvature A_i (diagonal, so that closed forms are short) and in optimum b_i."""

    curvatures: Tensor  # (clients, SIZE)
    optima: Tensor

    @classmethod
    def draw(cls, seed: int = 0) -> Quadratics:
        generator = torch.Generator().manual_seed(seed)
        curvatures = 0.2 + 4 * torch.rand(CLIENTS, SIZE, generator=generator)
        return cls(curvatures, 3 * torch.randn(CLIENTS, SIZE, generator=generator))

    def optimum(self) -> Tensor:
        """Of the sum of all clients' losses."""
        return (self.curvatures * self.optima).sum(dim=0) / self.curvatures.sum(dim=0)

    def local_steps(self, client: int, start: Tensor, correction: Correction | None) -> Tensor:
        """Where ``STEPS`` steps of size ``RATE`` lead."""
        weight = nn.Parameter(start.clone())
        part = PartOptimizer({"w": weight}, SGD)
        for _ in range(STEPS):
            weight.grad = self.curvatures[client] * (weight.detach() - self.optima[client])
            part.step(RATE, lambda _: 1, correction)
        return weight.detach().clone()


def federate(name: str, clients: Quadratics, rounds: int, cohort: int = CLIENTS, **merge: float) -> Tensor:
    """The merged weight after so many rounds, from zero; ``cohort`` clients a round, taken in turn."""
    members = [[(round_ * cohort + n) % CLIENTS for n in range(cohort)] for round_ in range(rounds)]
    return trajectory(name, clients, members, **merge)[-1]


def trajectory(
    name: str, clients: Quadratics, cohorts: list[list[int]], tokens: tuple[int, ...] = (5,) * CLIENTS, **merge: float
) -> list[Tensor]:
    """The merged weight after each of the rounds of these ``cohorts``, from zero."""
    rule = STRATEGIES[name](Merge(strategy=name, **merge))  # type: ignore[arg-type]
    corrections = [rule.correction() for _ in range(CLIENTS)]
    weight, state = torch.zeros(SIZE), {}
    weights: list[Tensor] = []
    seen: set[int] = set()
    for members in cohorts:
        copies = []
        for client in members:
            correction = corrections[client]
            if correction is not None:
                correction.begin({"w": weight}, {f"w/{key}": value for key, value in state.items()})
            copies.append(clients.local_steps(client, weight, correction))
            if correction is not None:
                correction.end({"w": copies[-1]}, STEPS * RATE)
        facts = RoundFacts(STEPS * RATE, len(members), len(seen), len(seen.union(members)))
        seen |= set(members)
        parts = [Contribution(copy, tokens[client]) for client, copy in zip(members, copies, strict=True)]
        weight, state, _ = Merger(rule, facts)("w", weight, parts, state)
        weights.append(weight)
    return weights


def error(weight: Tensor, clients: Quadratics) -> float:
    return float((weight - clients.optimum()).norm())


def test_fedavg_ends_where_the_closed_form_says_and_not_at_the_optimum() -> None:
    clients = Quadratics.draw()
    # y_i - x = (1 - (1 - rate A_i)^steps) (b_i - x): merging stands still where these add up to nothing
    pull = 1 - (1 - RATE * clients.curvatures) ** STEPS
    fixed_point = (pull * clients.optima).sum(dim=0) / pull.sum(dim=0)
    found = federate("fedavg", clients, 100)
    torch.testing.assert_close(found, fixed_point, atol=1e-5, rtol=1e-5)
    assert error(found, clients) > 0.5


@pytest.mark.parametrize("seed", range(2))
def test_scaffold_reaches_the_optimum(seed: int) -> None:
    clients = Quadratics.draw(seed)
    assert error(federate("scaffold", clients, 150), clients) < 1e-4
    assert error(federate("fedavg", clients, 150), clients) > 0.1


def test_scaffold_reaches_the_optimum_with_a_part_of_the_clients_in_each_round() -> None:
    clients = Quadratics.draw()
    assert error(federate("scaffold", clients, 300, cohort=3), clients) < 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_scaffold_reaches_the_optimum_of_the_clients_mean_loss_however_many_tokens_they_have(seed: int) -> None:
    clients, chance = Quadratics.draw(seed), random.Random(seed)
    cohorts = [chance.sample(range(CLIENTS), 2) for _ in range(400)]
    late = torch.stack(trajectory("scaffold", clients, cohorts, tokens=(20, 1, 8, 1))[-100:])
    assert error(late.mean(dim=0), clients) < 1e-3


def test_scaffold_never_forgets_a_client_that_lied_and_left() -> None:
    lie = 30.0

    class Liar(Quadratics):
        def local_steps(self, client: int, start: Tensor, correction: Correction | None) -> Tensor:
            return start + lie if client == CLIENTS - 1 else super().local_steps(client, start, correction)

    drawn, honest = Quadratics.draw(), list(range(CLIENTS - 1))
    clients = Liar(drawn.curvatures, drawn.optima)
    weight = trajectory("scaffold", clients, [[*honest, CLIENTS - 1]] + [honest] * 300)[-1]
    gradients = (clients.curvatures * (weight - clients.optima))[honest].sum(dim=0)
    torch.testing.assert_close(gradients, torch.full((SIZE,), lie / (STEPS * RATE)), rtol=1e-3, atol=1e-3)


def test_fedprox_ends_where_the_closed_form_says() -> None:
    clients, mu = Quadratics.draw(), 2.0
    # the same steps on a loss whose gradient at y is A (y - b) + mu (y - x)
    steep = clients.curvatures + mu
    pull = (1 - (1 - RATE * steep) ** STEPS) * clients.curvatures / steep
    fixed_point = (pull * clients.optima).sum(dim=0) / pull.sum(dim=0)
    torch.testing.assert_close(federate("fedprox", clients, 100, proximal_mu=mu), fixed_point, atol=1e-5, rtol=1e-5)


def test_fedprox_shrinks_drift_and_its_bias() -> None:
    clients, start = Quadratics.draw(), torch.zeros(SIZE)
    drifts = []
    for mu in (0.0, 1.0, 4.0):
        correction = STRATEGIES["fedprox"](Merge(proximal_mu=mu)).correction()
        assert correction is not None
        correction.begin({"w": start}, {})
        drifts.append(np.mean([float(clients.local_steps(n, start, correction).norm()) for n in range(CLIENTS)]))
    assert drifts[0] > 1.2 * drifts[1] > 1.5 * drifts[2]
    errors = [error(federate("fedprox", clients, 100, proximal_mu=mu), clients) for mu in (0.0, 1.0, 4.0)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("name", "rate"), [("fedavgm", 0.3), ("fedadagrad", 1.0), ("fedyogi", 0.1), ("fedadam", 0.1)])
def test_servers_steps_lead_to_fedavgs_fixed_point(name: str, rate: float) -> None:
    """Where the mean update is zero every one of these rules stands still, and only there."""
    clients = Quadratics.draw()
    found = federate(name, clients, 200, server_learning_rate=rate)
    torch.testing.assert_close(found, federate("fedavg", clients, 100), atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_clients_that_agree_are_led_to_their_optimum(name: str) -> None:
    alike = Quadratics(torch.ones(CLIENTS, SIZE), torch.tensor([[1.0, -2.0, 0.5]]).expand(CLIENTS, SIZE))
    rates = {"fedadagrad": 0.3, "fedyogi": 0.1, "fedadam": 0.1}
    rate = {"server_learning_rate": rates[name]} if name in rates else {}
    start = error(torch.zeros(SIZE), alike)
    assert error(federate(name, alike, 100, **rate), alike) < 0.1 * start
