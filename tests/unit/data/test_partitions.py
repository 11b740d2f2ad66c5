"""Partitions: every row once, the least kept, and what alpha does at both ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.data.partitions import Partition, apportion, by_group, dirichlet, iid, quantity_skew
from splitfl.errors import ConfigError

LABELS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=80)
ALPHAS = st.floats(1e-9, 1e6)
SEEDS = st.integers(0, 2**31 - 1)

Deal = Callable[[list[str], int, int, int], Partition]  # labels, clients, seed, minimum
KINDS: dict[str, Deal] = {
    "iid": lambda labels, *rest: iid(len(labels), *rest),
    "dirichlet": lambda labels, clients, *rest: dirichlet(labels, clients, 0.3, *rest),
    "quantity": lambda labels, clients, *rest: quantity_skew(len(labels), clients, 0.3, *rest),
    "group": by_group,
}


def assert_covers(partition: Partition, rows: int, clients: int, minimum: int) -> None:
    assert len(partition) == clients
    assert sorted(int(row) for part in partition for row in part) == list(range(rows))
    assert all(len(part) >= minimum and list(part) == sorted(part) for part in partition)


@given(LABELS, ALPHAS, SEEDS, st.data())
def test_every_row_goes_to_one_client_and_the_least_is_kept(
    labels: list[str], alpha: float, seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    minimum = data.draw(st.integers(1, len(labels) // clients))
    count = len(labels)
    for partition in (
        iid(count, clients, seed, minimum),
        dirichlet(labels, clients, alpha, seed, minimum),
        quantity_skew(count, clients, alpha, seed, minimum),
    ):
        assert_covers(partition, count, clients, minimum)


@given(LABELS, SEEDS, st.data())
def test_by_group_covers_and_mixes_no_groups_while_there_are_clients_enough(
    labels: list[str], seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    partition = by_group(labels, clients, seed)
    assert_covers(partition, len(labels), clients, 1)
    if clients >= len(set(labels)):
        assert all(len({labels[row] for row in part}) == 1 for part in partition)
    else:
        assert sum(len({labels[row] for row in part}) for part in partition) == len(set(labels))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_partition_and_another_another(kind: str) -> None:
    labels = list("ab" * 40)
    first, again, other = (KINDS[kind](labels, 4, seed, 1) for seed in (1, 1, 2))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))


@given(SEEDS, st.integers(1, 4), st.integers(2, 10))
def test_large_alpha_gives_every_client_the_mixture_of_the_whole(seed: int, per_label: int, clients: int) -> None:
    labels = [label for label, times in (("a", 3), ("b", 2), ("c", 1)) for _ in range(times * per_label * clients)]
    for part in dirichlet(labels, clients, 1e9, seed):
        counts = Counter(labels[row] for row in part)
        assert all(abs(counts[label] - times * per_label) <= 1 for label, times in (("a", 3), ("b", 2), ("c", 1)))


@given(SEEDS, st.integers(1, 4), st.integers(1, 6))
def test_small_alpha_gives_every_client_one_label(seed: int, holders: int, size: int) -> None:
    labels = list("abc" * holders * size)
    partition = dirichlet(labels, 3 * holders, 1e-9, seed)
    assert all(len({labels[row] for row in part}) == 1 for part in partition)


@given(SEEDS)
def test_alpha_decides_how_unlike_sizes_are(seed: int) -> None:
    alike = [len(part) for part in quantity_skew(1000, 10, 1e6, seed)]
    unlike = [len(part) for part in quantity_skew(1000, 10, 1e-6, seed, minimum=3)]
    assert max(alike) - min(alike) <= 5
    assert sorted(unlike)[:-1] == [3] * 9


def test_larger_group_has_more_clients() -> None:
    partition = by_group(["big"] * 90 + ["small"] * 10, 10, seed=0)
    assert [len(part) for part in partition] == [10] * 10


@given(st.integers(0, 200), st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_apportioned_numbers_sum_up_and_are_less_than_one_off(total: int, shares: list[float]) -> None:
    exact = total * np.array(shares) / sum(shares)
    counts = apportion(total, np.array(shares))
    assert counts.sum() == total
    assert np.all(np.abs(counts - exact) < 1)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_clients_for_the_rows_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="10 rows are too few for 4 clients with at least 3"):
        KINDS[kind](list("ab" * 5), 4, 0, 3)
    with pytest.raises(ConfigError, match="0 clients"):
        KINDS[kind](list("ab"), 0, 0, 1)


def test_group_with_too_few_rows_for_its_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave one with 1 rows, and the least is 2"):
        by_group(["big"] * 9 + ["small"], 2, 0, 2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_no_dirichlet_distribution_has_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha is"):
        dirichlet(list("ab"), 2, alpha, 0)
    with pytest.raises(ConfigError, match="alpha is"):
        quantity_skew(2, 2, alpha, 0)
