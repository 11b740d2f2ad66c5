"""FedAvg over one tensor: the mean by label tokens, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitfl.federation.strategies import STRATEGIES, Contribution, FedAvg


def parts(*pairs: tuple[list[float], int]) -> list[Contribution]:
    return [Contribution(torch.tensor(values), tokens) for values, tokens in pairs]


PREVIOUS = torch.tensor([9.0, 9.0])


def test_mean_is_weighted_by_label_tokens() -> None:
    merged = FedAvg().merge("w", PREVIOUS, parts(([1.0, 0.0], 30), ([5.0, 4.0], 10)))
    assert merged.tolist() == [2.0, 1.0]
    assert merged.dtype == torch.float32


def test_copy_that_no_token_trained_does_not_count() -> None:
    merged = FedAvg().merge("w", PREVIOUS, parts(([1.0, 2.0], 10), ([100.0, 100.0], 0)))
    assert merged.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("contributions", [[], parts(([1.0, 2.0], 0), ([3.0, 4.0], 0))])
def test_tensor_stays_as_it_was_when_no_token_trained_any_copy(contributions: list[Contribution]) -> None:
    assert torch.equal(FedAvg().merge("w", PREVIOUS, contributions), PREVIOUS)


def test_copy_of_one_client_comes_back_to_the_bit() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FedAvg().merge("w", tensor, [Contribution(tensor, 12345)]), tensor)


def test_copies_that_agree_come_back_to_the_bit() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = FedAvg().merge("w", tensor, [Contribution(tensor, tokens) for tokens in (7, 11, 13)])
    assert torch.equal(merged, tensor)


def test_sum_does_not_lose_small_clients() -> None:
    merged = FedAvg().merge("w", PREVIOUS, parts(([1e8, 1.0], 1), ([1.0, 1.0], 1), ([-1e8, 1.0], 1)))
    assert merged[0] == pytest.approx(1 / 3)  # in fp32 the 1 would vanish beside 1e8


def test_merge_leaves_what_it_is_given_alone() -> None:
    copies = parts(([1.0, 2.0], 1), ([3.0, 4.0], 1))
    FedAvg().merge("w", PREVIOUS, copies)
    assert copies[0].tensor.tolist() == [1.0, 2.0]
    assert PREVIOUS.tolist() == [9.0, 9.0]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(0, 10**9)), min_size=1, max_size=8))
def test_mean_lies_between_the_copies_that_count(pairs: list[tuple[float, int]]) -> None:
    counting = [value for value, tokens in pairs if tokens]
    merged = float(FedAvg().merge("w", torch.tensor([0.5]), parts(*(([value], tokens) for value, tokens in pairs))))
    if not counting:
        assert merged == 0.5
    else:
        slack = 1e-6 * max(1.0, *(abs(value) for value in counting))
        assert min(counting) - slack <= merged <= max(counting) + slack


def test_every_strategy_of_the_settings_exists() -> None:
    from splitfl.config import Merge

    names = Merge.model_fields["strategy"].annotation
    assert set(STRATEGIES) == set(names.__args__)  # type: ignore[union-attr]
