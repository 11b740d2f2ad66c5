"""Averages: the mean by tokens and nothing else; and robust ones, each within its bound whatever one client sends."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from splitfl.config import Merge
from splitfl.federation import robust
from splitfl.federation.merging import Merger
from splitfl.federation.robust import (
    Contribution,
    average_of,
    inner_products,
    krum,
    median,
    screen_of,
    token_mean,
    trimmed_mean,
)
from splitfl.federation.strategies import STRATEGIES, RoundFacts


def parts(*pairs: tuple[list[float], int]) -> list[Contribution]:
    return [Contribution(torch.tensor(values), tokens) for values, tokens in pairs]


def copies(rows: Tensor) -> list[Contribution]:
    return [Contribution(row, 1) for row in rows]


PREVIOUS = torch.tensor([9.0, 9.0])


def fedavg(previous: Tensor, given: list[Contribution]) -> Tensor:
    return Merger(STRATEGIES["fedavg"](Merge()), RoundFacts())("w", previous, given, {}).tensor


# the mean


def test_mean_is_weighted_by_label_tokens() -> None:
    merged = fedavg(PREVIOUS, parts(([1.0, 0.0], 30), ([5.0, 4.0], 10)))
    assert merged.tolist() == [2.0, 1.0]
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed_mean"])
def test_copy_that_no_token_trained_does_not_count(aggregate: str) -> None:
    merger = Merger(STRATEGIES["fedavg"](Merge.model_validate({"aggregate": aggregate})), RoundFacts())
    merged, *_ = merger("w", PREVIOUS, parts(([1.0, 2.0], 10), ([100.0, 100.0], 0), ([100.0, 100.0], 0)), {})
    assert merged.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("tokens", [(12345,), (7, 11, 13)])
def test_copies_that_agree_come_back_to_the_bit(tokens: tuple[int, ...]) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fedavg(tensor, [Contribution(tensor, count) for count in tokens]), tensor)


def test_sum_does_not_lose_small_clients() -> None:
    merged = fedavg(PREVIOUS, parts(([1e8, 1.0], 1), ([1.0, 1.0], 1), ([-1e8, 1.0], 1)))
    assert merged[0] == pytest.approx(1 / 3)  # in fp32 the 1 would vanish beside 1e8


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 10**9)), min_size=1, max_size=8))
def test_mean_lies_between_the_copies(pairs: list[tuple[float, int]]) -> None:
    merged = float(token_mean(parts(*(([value], tokens) for value, tokens in pairs))))
    values = [value for value, _ in pairs]
    slack = 1e-6 * max(1.0, *(abs(value) for value in values))
    assert min(values) - slack <= merged <= max(values) + slack


# robust averages against numpy, and their bounds


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_median_is_numpys(count: int) -> None:
    rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
    np.testing.assert_allclose(median(copies(rows)), np.median(rows.double().numpy(), axis=0), rtol=1e-12)


def test_trimmed_mean_leaves_out_the_ends() -> None:
    rows = torch.tensor([[1.0], [100.0], [2.0], [3.0], [-100.0]])
    assert trimmed_mean(copies(rows), 1).item() == 2.0


@pytest.mark.parametrize(("count", "fraction", "trimmed"), [(3, 0.1, 1), (10, 0.1, 1), (11, 0.1, 2), (2, 0.4, 0)])
def test_fraction_is_rounded_up_and_leaves_a_copy(count: int, fraction: float, trimmed: int) -> None:
    rows = torch.arange(count, dtype=torch.float32)[:, None] ** 2
    found = average_of(Merge(aggregate="trimmed_mean", trim_fraction=fraction))(copies(rows))
    assert found.item() == pytest.approx(rows[trimmed : count - trimmed].mean().item())


ATTACKS = {
    "1000 x": lambda update: 1000 * update,
    "sign flipped": lambda update: -update,
    "-1000 x": lambda update: -1000 * update,
    "largest": lambda update: torch.full_like(update, 3e38),
}


def honest(seed: int, clients: int = 5) -> Tensor:
    """Updates that agree but for noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, generator=generator) + 0.3 * torch.randn(clients, 20, generator=generator)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("aggregate", ["median", "trimmed_mean"])
@examples(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), clients=st.integers(2, 6))
def test_one_liar_does_not_move_a_coordinate_past_the_honest_ones(
    aggregate: Any, attack: str, seed: int, clients: int
) -> None:
    updates = honest(seed, clients)
    lie = ATTACKS[attack](updates.mean(dim=0))
    merged = average_of(Merge(aggregate=aggregate))(copies(torch.cat([lie[None], updates])))
    slack = 1e-6
    assert (merged >= updates.min(dim=0).values - slack).all()
    assert (merged <= updates.max(dim=0).values + slack).all()


@pytest.mark.parametrize("attack", ATTACKS)
@examples(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 10**12))
def test_clipped_mean_moves_no_further_than_the_norm(attack: str, seed: int, tokens: int) -> None:
    updates = honest(seed)
    updates = torch.cat([ATTACKS[attack](updates.mean(dim=0))[None], updates])
    screen = screen_of(Merge(clip_norm=0.5), products(updates))
    clipped = [factor * row.double() for factor, row in zip(screen, updates, strict=True) if factor is not None]
    weights = [tokens, *[10] * 5]
    merged = token_mean([Contribution(row, count) for row, count in zip(clipped, weights, strict=True)])
    assert float(merged.norm()) <= 0.5 + 1e-6


@examples(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 7), fraction=st.floats(0.01, 0.49), same_sign=st.booleans())
def test_clipped_copies_move_median_and_trimmed_mean_no_further_than_root_two_norms(
    seed: int, clients: int, fraction: float, same_sign: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(clients, 12, generator=generator) * (torch.rand(clients, 12, generator=generator) > 0.5)
    updates = updates.abs() if same_sign else updates
    rows = [0.5 * row / row.norm() if row.any() else row for row in updates]
    for merge in (Merge(aggregate="median"), Merge(aggregate="trimmed_mean", trim_fraction=fraction)):
        assert float(average_of(merge)([Contribution(row, 1) for row in rows]).norm()) <= 0.5 * 2**0.5 + 1e-6


def test_median_of_clipped_copies_may_move_further_than_the_norm() -> None:
    rows = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert float(average_of(Merge(aggregate="median"))(copies(rows)).norm()) > 1.2 * float(rows[0].norm())


def products(updates: Tensor) -> Tensor:
    """Inner products of updates (clients, size) to weights that were zero, in two tensors."""
    pairs = [(torch.zeros(part.shape[1]), list(part)) for part in updates.split([7, updates.shape[1] - 7], dim=1)]
    return inner_products(pairs, len(updates))


def test_inner_products_are_those_of_the_whole_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "COLUMNS", 3)  # several pieces a tensor
    updates = honest(0)
    torch.testing.assert_close(products(updates), updates.double() @ updates.double().T)


def test_tensor_that_a_client_does_not_hold_counts_as_not_moved() -> None:
    held, start = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    assert inner_products([(start, [held, None])], 2).tolist() == [[13.0, 0.0], [0.0, 0.0]]


def slow_krum(updates: Tensor, byzantine: int) -> int:
    """Blanchard et al. 2017, section 4, by its words."""
    scores = []
    for i in range(len(updates)):
        others = [float((updates[i] - updates[j]).double().square().sum()) for j in range(len(updates)) if j != i]
        scores.append(sum(sorted(others)[: len(updates) - byzantine - 2]))
    return scores.index(min(scores))


@examples(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), byzantine=st.integers(0, 2))
def test_krum_is_the_papers(seed: int, byzantine: int) -> None:
    updates = honest(seed, 2 * byzantine + 4)
    assert krum(products(updates), byzantine) == slow_krum(updates, byzantine)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("seed", range(5))
def test_krum_chooses_no_liar(attack: str, seed: int) -> None:
    updates = honest(seed)
    for place in range(6):
        lie = ATTACKS[attack](updates.mean(dim=0))[None]
        screen = screen_of(Merge(aggregate="krum"), products(torch.cat([updates[:place], lie, updates[place:]])))
        assert screen[place] is None
        assert sum(factor is not None for factor in screen) == 1


@pytest.mark.parametrize("seed", range(5))
def test_what_krum_chooses_is_as_near_to_an_honest_update_as_the_bound_says(seed: int) -> None:
    updates, near = honest(seed), honest(seed).mean(dim=0) * 1.2  # a liar that Krum may well choose
    everybody = torch.cat([updates, near[None]])
    chosen = krum(products(everybody), 1)
    assert chosen is not None
    to_honest = min(float((everybody[chosen] - row).square().sum()) for row in updates if row is not everybody[chosen])
    worst = max(
        sum(sorted(float((row - other).square().sum()) for other in everybody if other is not row)[:3])
        for row in updates
    )
    assert to_honest <= worst


def test_krum_compares_clipped_updates() -> None:
    updates = honest(0)
    long = torch.cat([updates, 1e6 * updates.mean(dim=0)[None]])  # the most central direction
    expected = slow_krum(long / long.norm(dim=1, keepdim=True), 1)
    assert expected == 5 != slow_krum(long, 1)
    screen = screen_of(Merge(aggregate="krum", clip_norm=1.0), products(long))
    assert [number for number, factor in enumerate(screen) if factor is not None] == [expected]


@pytest.mark.parametrize(("count", "byzantine"), list(itertools.product([1, 4], [1])))
def test_krum_of_too_few_updates_is_nobody(count: int, byzantine: int) -> None:
    assert krum(products(honest(0, count)), byzantine) is None
