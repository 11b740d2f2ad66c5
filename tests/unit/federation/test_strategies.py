"""The seven rules against slow numpy ones written from the papers, over several rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from splitfl.config import Merge, parse_federation
from splitfl.errors import ConfigError
from splitfl.federation.merging import Merger, choose_strategy
from splitfl.federation.robust import Contribution
from splitfl.federation.strategies import STRATEGIES, RoundFacts, Strategy

Array = NDArray[np.float64]
Rounds = list[list[tuple[Array, int]]]  # each client's (update y_i - x, tokens), round by round
STEP_SIZES = 0.3


# the oracle: element by element, names and order as in the papers


def mean_update(updates: list[tuple[Array, int]]) -> Array:
    total = sum(tokens for _, tokens in updates)
    return np.array([sum(update[n] * tokens for update, tokens in updates) / total for n in range(len(updates[0][0]))])


def plain(x: Array, rounds: Rounds, merge: Merge) -> Array:  # noqa: ARG001
    for updates in rounds:
        x = x + mean_update(updates)
    return x


def with_momentum(x: Array, rounds: Rounds, merge: Merge) -> Array:
    v = [0.0] * len(x)
    for updates in rounds:
        delta = mean_update(updates)
        v = [merge.server_momentum * v[n] + delta[n] for n in range(len(x))]
        x = np.array([x[n] + rate(merge, 1.0) * v[n] for n in range(len(x))])
    return x


def adaptive(name: str) -> Callable[[Array, Rounds, Merge], Array]:
    def run(x: Array, rounds: Rounds, merge: Merge) -> Array:
        tau, beta1, beta2 = merge.server_epsilon, merge.server_momentum, merge.server_beta2
        if name == "fedadagrad":
            beta1 = 0.0
        m, v = [0.0] * len(x), [tau * tau] * len(x)
        for updates in rounds:
            delta = mean_update(updates)
            for n in range(len(x)):
                m[n] = beta1 * m[n] + (1 - beta1) * delta[n]
                if name == "fedadagrad":
                    v[n] += delta[n] ** 2
                elif name == "fedyogi":
                    v[n] -= (1 - beta2) * delta[n] ** 2 * np.sign(v[n] - delta[n] ** 2)
                else:
                    v[n] = beta2 * v[n] + (1 - beta2) * delta[n] ** 2
            x = np.array([x[n] + rate(merge, 0.01) * m[n] / (v[n] ** 0.5 + tau) for n in range(len(x))])
        return x

    return run


def scaffold(x: Array, rounds: Rounds, merge: Merge) -> Array:
    """With all clients in every round, of equal weight: c is the mean of the variates that the clients keep."""
    own = [np.zeros(len(x)) for _ in rounds[0]]
    c = np.zeros(len(x))
    for updates in rounds:
        fresh = [c_i - c - update / STEP_SIZES for c_i, (update, _) in zip(own, updates, strict=True)]
        c = c + sum((new - old for new, old in zip(fresh, own, strict=True)), np.zeros(len(x))) / len(own)
        own = fresh
        x = x + rate(merge, 1.0) * sum((update for update, _ in updates), np.zeros(len(x))) / len(updates)
    return np.concatenate([x, c])


def rate(merge: Merge, otherwise: float) -> float:
    return otherwise if merge.server_learning_rate is None else merge.server_learning_rate


ORACLES: dict[str, Callable[[Array, Rounds, Merge], Array]] = {
    "fedavg": plain,
    "fedprox": plain,
    "fedavgm": with_momentum,
    **{name: adaptive(name) for name in ("fedadagrad", "fedyogi", "fedadam")},
}


def merged_over(name: str, x: Array, rounds: Rounds, merge: Merge) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights, state = torch.tensor(x, dtype=torch.float32), {}
    for number, updates in enumerate(rounds):
        clients = len(updates)
        facts = RoundFacts(STEP_SIZES, clients, clients if number else 0, clients)
        parts = [Contribution((weights.double() + torch.tensor(u)).float(), tokens) for u, tokens in updates]
        weights, state, _ = Merger(STRATEGIES[name](merge), facts)("w", weights, parts, state)
    return weights, dict(state)


numbers = st.floats(-1.0, 1.0, width=32)
vectors = st.lists(numbers, min_size=3, max_size=3).map(np.array)


def round_lists(tokens: st.SearchStrategy[int]) -> st.SearchStrategy[Rounds]:
    clients = st.lists(st.tuples(vectors, tokens), min_size=2, max_size=2)
    return st.lists(clients, min_size=1, max_size=4)


@pytest.mark.parametrize("name", ORACLES)
@examples(deadline=None, max_examples=40)
@given(x=vectors, rounds=round_lists(st.integers(1, 1000)), eta=st.sampled_from([None, 0.5]))
def test_strategy_is_the_papers(name: str, x: Array, rounds: Rounds, eta: float | None) -> None:
    merge = Merge(strategy=name, server_learning_rate=eta, server_momentum=0.8, server_beta2=0.9, server_epsilon=0.1)
    merged, state = merged_over(name, x, rounds, merge)
    np.testing.assert_allclose(merged.numpy(), ORACLES[name](x, rounds, merge), rtol=1e-4, atol=1e-4)
    assert tuple(state) == STRATEGIES[name].state_names


@examples(deadline=None, max_examples=40)
@given(x=vectors, rounds=round_lists(st.just(7)), eta=st.sampled_from([None, 0.5]))
def test_scaffolds_variate_is_the_mean_of_those_that_clients_keep(x: Array, rounds: Rounds, eta: float | None) -> None:
    merge = Merge(strategy="scaffold", server_learning_rate=eta)
    merged, state = merged_over("scaffold", x, rounds, merge)
    found = torch.cat([merged, state["control"]]).numpy()
    np.testing.assert_allclose(found, scaffold(x, rounds, merge), rtol=1e-3, atol=1e-3)


def test_scaffolds_variate_counts_clients_that_stay_away_and_those_that_are_new() -> None:
    rule, zero = STRATEGIES["scaffold"](Merge()), torch.zeros(1, dtype=torch.float64)
    first, state = rule.merge(zero, zero - 2.0, {}, RoundFacts(1.0, contributed=2, before=0, clients=2))
    assert state["control"].item() == 2.0  # both moved by 2
    _, state = rule.merge(first, first - 5.0, state, RoundFacts(1.0, contributed=1, before=2, clients=3))
    # the third, new one: c_3 = 0 - 2 + 5, and the sum of the first two stays 4
    assert state["control"].item() == pytest.approx((4.0 + 3.0) / 3)


@examples(deadline=None, max_examples=40)
@given(x=vectors, rounds=round_lists(st.integers(1, 1000)))
def test_scaffold_counts_each_client_once_whatever_its_tokens(x: Array, rounds: Rounds) -> None:
    alike = [[(update, 1) for update, _ in updates] for updates in rounds]
    merge = Merge(strategy="scaffold")
    (found, state), (wanted, known) = (merged_over("scaffold", x, given, merge) for given in (rounds, alike))
    assert torch.equal(found, wanted)
    assert torch.equal(state["control"], known["control"])


def test_client_that_is_counted_once_counts_less_when_it_is_late() -> None:
    parts = [Contribution(torch.tensor([0.0]), 7), Contribution(torch.tensor([3.0]), 900, discount=0.5)]
    merger = Merger(STRATEGIES["scaffold"](Merge()), RoundFacts())
    assert merger("w", torch.zeros(1), parts, {}).tensor.item() == pytest.approx(1.0)  # 3 x 0.5 / 1.5


@pytest.mark.parametrize("name", STRATEGIES)
def test_rule_changes_nothing_in_place(name: str) -> None:
    rule, x = STRATEGIES[name](Merge()), torch.ones(2, dtype=torch.float64)
    _, state = rule.merge(x, x + 0.5, {}, RoundFacts())
    before = {key: value.clone() for key, value in state.items()}
    rule.merge(x, x + 0.5, state, RoundFacts())
    assert x.tolist() == [1.0, 1.0]
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_tensor_that_no_token_trained_stays_and_is_remembered_as_it_was(name: str) -> None:
    x, state = torch.tensor([9.0]), {key: torch.ones(1) for key in STRATEGIES[name].state_names}
    merger = Merger(STRATEGIES[name](Merge()), RoundFacts())
    for parts in ([], [Contribution(torch.zeros(1), 0)]):
        merged, kept, refused = merger("w", x, parts, state)
        assert torch.equal(merged, x)
        assert kept == state
        assert not refused


# what is not let into the weights


@pytest.mark.parametrize(
    ("name", "lie"), [("fedavgm", 3e38), ("scaffold", 3e38), ("fedadagrad", 1e25), ("fedyogi", 1e25), ("fedadam", 1e25)]
)
def test_step_that_would_not_be_finite_leaves_weights_and_state_as_they_were(name: str, lie: float) -> None:
    merger = Merger(STRATEGIES[name](Merge(strategy=name, server_learning_rate=2.0)), RoundFacts(step_sizes=0.1))
    x, state, _ = merger("w", torch.zeros(2), [Contribution(torch.tensor([0.1, 0.2]), 5)], {})
    merged, kept, refused = merger("w", x, [Contribution(torch.tensor([0.1, lie]), 5)], state)
    assert refused
    assert torch.equal(merged, x)
    assert kept is state
    merged, _, refused = merger("w", x, [Contribution(x + 0.1, 5)], state)
    assert not refused
    assert not torch.equal(merged, x)


# what a lie does to the adaptive three, as docs/strategies.md says


def steps_after(name: str, changes: list[float]) -> list[float]:
    """What each of these mean updates moves one coordinate by, in server_learning_rates."""
    rule, x, state = STRATEGIES[name](Merge(strategy=name)), torch.zeros(1, dtype=torch.float64), {}
    steps = []
    for change in changes:
        merged, state = rule.merge(x, x + change, state, RoundFacts())
        steps.append((merged - x).item() / rule.rate)
        x = merged
    return steps


@examples(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_adaptive_step_is_bounded_whatever_is_sent(changes: list[float]) -> None:
    merge = Merge()
    beta1, beta2 = merge.server_momentum, merge.server_beta2
    bound = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5
    assert max(map(abs, steps_after("fedadam", changes))) <= bound < 2.35
    assert max(map(abs, steps_after("fedadagrad", changes))) <= 1


@pytest.mark.parametrize("rounds", [200, 400])
def test_honest_steps_are_short_for_long_after_one_lie(rounds: int) -> None:
    beta2 = Merge().server_beta2
    short = 1.0 / ((1 - beta2) ** 0.5 * beta2 ** (rounds / 2) * 1000.0)
    assert steps_after("fedadam", [1000.0] + [1.0] * rounds)[-1] == pytest.approx(short, rel=0.1)
    assert steps_after("fedadam", [1000.0] + [1.0] * 1500)[-1] > 0.9
    assert steps_after("fedadagrad", [1000.0] + [1.0] * rounds)[-1] == pytest.approx(1e-3, rel=0.1)
    assert (
        steps_after("fedyogi", [30.0] + [1.0] * 400)[-1] < 0.5 < 0.9 < steps_after("fedyogi", [30.0] + [1.0] * 900)[-1]
    )


class Careless(Strategy):
    """Returns what its test wants."""

    state_names = ("seen",)
    returned: ClassVar[tuple[torch.Tensor, dict[str, torch.Tensor]]]

    def merge(self, *_: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.returned


@pytest.mark.parametrize(
    ("merged", "kept", "odd"),
    [
        ((3,), {"seen": (2,)}, r"'the weights' \(3,\), expected \(2,\)"),
        ((), {"seen": (2,)}, r"'the weights' \(\), expected \(2,\)"),
        ((2,), {"seen": (1,)}, r"'seen' \(1,\), expected \(2,\)"),
        ((2,), {}, r"'seen' missing, expected \(2,\)"),
        ((2,), {"seen": (2,), "more": (2,)}, r"'more' \(2,\), expected none"),
    ],
)
def test_strategy_that_returns_something_else_is_named_with_the_tensor(
    merged: tuple[int, ...], kept: dict[str, tuple[int, ...]], odd: str
) -> None:
    rule = Careless(Merge(strategy="careless"))
    Careless.returned = torch.zeros(merged), {what: torch.zeros(shape) for what, shape in kept.items()}
    with pytest.raises(ConfigError, match=f"\"careless\" returned for 'head.weight': {odd}"):
        Merger(rule, RoundFacts())("head.weight", torch.zeros(2), [Contribution(torch.ones(2), 5)], {})


# what is refused


def chosen(**tables: Any) -> object:
    return choose_strategy(parse_federation(tables, "the test"))


def test_unknown_strategy_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'fedsgd' does not exist") as error:
        chosen(merge={"strategy": "fedsgd"})
    assert all(name in error.value.remedy for name in STRATEGIES)


def test_settings_name_every_strategy() -> None:
    description = Merge.model_fields["strategy"].description or ""
    assert all(name in description for name in STRATEGIES)


@pytest.mark.parametrize(
    ("merge", "field"),
    [
        ({"server_momentum": 0.5}, "server_momentum"),
        ({"strategy": "fedavgm", "server_beta2": 0.5}, "server_beta2"),
        ({"strategy": "fedadagrad", "server_momentum": 0.5}, "server_momentum"),
        ({"strategy": "fedadam", "proximal_mu": 1.0}, "proximal_mu"),
        ({"strategy": "fedprox", "server_learning_rate": 1.0}, "server_learning_rate"),
        ({"trim_fraction": 0.2}, "trim_fraction"),
        ({"aggregate": "median", "byzantine": 2}, "byzantine"),
    ],
)
def test_parameter_that_would_be_left_unread_is_refused(merge: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"merge.{field} is set, but"):
        chosen(merge=merge)


SGD = {"name": "sgd"}
LATE = {"staleness": "polynomial"}
CUTS = {"max_top": 2}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"merge": {"strategy": "scaffold"}}, ("scaffold", "adamw")),
        ({"merge": {"strategy": "scaffold", "aggregate": "median"}, "optimizer": SGD}, ("scaffold", "robust")),
        ({"merge": {"strategy": "scaffold", "clip_norm": 1.0}, "optimizer": SGD}, ("scaffold", "robust")),
        ({"merge": {"strategy": "scaffold"}, "optimizer": SGD, "model": CUTS}, ("scaffold", "cuts")),
        (
            {"merge": {"strategy": "scaffold"}, "optimizer": SGD, "rounds": LATE},
            ("scaffold", "late"),
        ),
        (
            {"merge": {"strategy": "fedprox", "proximal_mu": 1.0}, "optimizer": {**SGD, "learning_rate": 2.0}},
            ("proximal_mu", "overshoots"),
        ),
        ({"merge": {"aggregate": "median"}, "rounds": LATE}, ("median", "late")),
        ({"merge": {"aggregate": "krum"}, "rounds": {"min_clients": 4}}, ("krum", "needs 5 updates")),
        ({"merge": {"aggregate": "krum"}, "rounds": {"min_clients": 5}, "model": CUTS}, ("krum", "cuts")),
        ({"merge": {"aggregate": "median"}, "model": CUTS}, ("median", "cuts")),
        ({"merge": {"aggregate": "trimmed_mean"}, "model": CUTS}, ("trimmed_mean", "cuts")),
        ({"merge": {"share": "none", "strategy": "fedadam"}}, ("none", "fedadam")),
        ({"merge": {"share": "none", "aggregate": "median"}}, ("none", "median")),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(tables: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(**tables)
    assert all(word in error.value.message for word in words)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed_mean", "krum"])
def test_all_other_combinations_are_taken(name: str, aggregate: str) -> None:
    if name == "scaffold" and aggregate != "mean":
        return
    merge = {"strategy": name, "aggregate": aggregate}
    strategy = chosen(merge=merge, optimizer=SGD, rounds={"min_clients": 5})
    assert type(strategy) is STRATEGIES[name]
