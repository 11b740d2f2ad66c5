"""Why ends that are merged share one frozen A: the mean of products is not the product of means."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfl.config import Federation
from splitfl.federation.merging import Merger, choose_strategy
from splitfl.federation.robust import Contribution
from splitfl.federation.strategies import RoundFacts
from splitfl.split.training import initial_a

OUT, RANK, IN = 12, 4, 10


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def averaged(copies: list[Tensor], tokens: list[int]) -> Tensor:
    parts = [Contribution(copy, count) for copy, count in zip(copies, tokens, strict=True)]
    merge = Merger(choose_strategy(Federation()), RoundFacts())
    return merge("w", torch.zeros_like(copies[0]), parts, {}).tensor


def test_averaging_a_and_b_apart_is_not_averaging_what_they_do() -> None:
    tokens = [100, 300]
    a, b = [drawn(seed, RANK, IN) for seed in (0, 1)], [drawn(seed, OUT, RANK) for seed in (2, 3)]
    wanted = averaged([b[0] @ a[0], b[1] @ a[1]], tokens)
    apart = averaged(b, tokens) @ averaged(a, tokens)
    missing = 0.25 * 0.75 * (b[0] - b[1]) @ (a[0] - a[1])  # the covariance of B and A over the clients
    torch.testing.assert_close(wanted - apart, missing, rtol=1e-4, atol=1e-5)
    assert missing.norm() > 0.25 * wanted.norm()
    # Two clients that have undone each other's sign have learned the same, and apart they would come to nothing.
    same = averaged([b[0] @ a[0], -b[0] @ -a[0]], [1, 1])
    assert torch.equal(same, b[0] @ a[0])
    assert not (averaged([b[0], -b[0]], [1, 1]) @ averaged([a[0], -a[0]], [1, 1])).any()


@given(tokens=st.lists(st.integers(1, 10_000), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_with_one_frozen_a_averaging_b_is_averaging_what_they_do(tokens: list[int], seed: int) -> None:
    a = initial_a("model.layers.0.mlp.up_proj.lora_A.default.weight", torch.Size([RANK, IN]), seed)
    b = [drawn(seed + number, OUT, RANK) for number in range(len(tokens))]
    wanted = averaged([copy @ a for copy in b], tokens)
    torch.testing.assert_close(averaged(b, tokens) @ a, wanted, rtol=1e-5, atol=1e-5)
