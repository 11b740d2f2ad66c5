"""A head's update names the tokens it was trained on; noise on it hides them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitfl.cut import Cut
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import HeadUpdate
from splitfl.lab.audit.public import Knowledge
from splitfl.lab.audit.updates import bag_from_update, score_bag, set_scores

from .bench import Bench, generator


@pytest.fixture(scope="module")
def knowledge(bench: Bench) -> Knowledge:
    return bench.knowledge(Cut(0, 0), Mechanism("token", 1.0))


def update(knowledge: Knowledge, bench: Bench, make: Any, noise: float = 0.0) -> HeadUpdate:
    """One step of the whole model's head on two private records."""
    whole = knowledge.model.whole
    ids = torch.stack(bench.text.private[:2])
    before = whole.model.lm_head.weight.detach().clone()
    weight = before.clone().requires_grad_(True)
    with torch.no_grad():
        final = whole(whole.embed(ids))[:, :-1].flatten(0, 1)
    optimizer = make([weight])
    torch.nn.functional.cross_entropy(final @ weight.T, ids[:, 1:].flatten()).backward()
    optimizer.step()
    after = weight.detach() + noise * torch.randn(weight.shape, generator=generator())
    return HeadUpdate(before, after, ids[:, 1:].flatten(), noise)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_update_of_the_head_names_its_tokens(knowledge: Knowledge, bench: Bench, optimizer: Any) -> None:
    seen = update(knowledge, bench, lambda weights: optimizer(weights, lr=1e-3))
    found = score_bag(knowledge, bag_from_update(knowledge, seen), seen)
    assert found.recall > 0.7
    assert found.f1 > found.by_frequency


def test_noise_on_the_update_hides_its_tokens(knowledge: Knowledge, bench: Bench) -> None:
    seen = update(knowledge, bench, lambda weights: torch.optim.SGD(weights, lr=1e-3), noise=0.1)
    assert score_bag(knowledge, bag_from_update(knowledge, seen), seen).recall < 0.1


def test_set_scores_count_what_is_common() -> None:
    assert set_scores({1, 2, 3, 4}, {3, 4, 5}) == pytest.approx((0.5, 2 / 3, 4 / 7))
    assert set_scores(set(), {1}) == (0.0, 0.0, 0.0)
