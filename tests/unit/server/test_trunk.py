"""The trunk's own step: as long as the learning rate says, over the tokens that crossed."""

from __future__ import annotations

import pytest
import torch
from helpers import MemorySource

from server_model.trunk import Trunk
from splitfl.config import parse_federation

SETTINGS = {"optimizer": {"name": "sgd", "max_grad_norm": 0.0}}


@pytest.mark.parametrize(("rate", "tokens"), [(0.5, 1), (0.25, 1), (0.25, 4)])
def test_step_is_the_learning_rate_times_the_mean_gradient(source: MemorySource, rate: float, tokens: int) -> None:
    trunk = Trunk(parse_federation(SETTINGS, "the test"), source, range(1, 3), torch.device("cpu"))
    before = {name: weight.detach().clone() for name, weight in trunk.trainable().items()}
    for weight in trunk.trainable().values():
        weight.grad = torch.ones_like(weight)
    trunk.tokens.update(dict.fromkeys(range(1, 3), tokens))
    trunk.step(rate)
    for name, weight in trunk.trainable().items():
        torch.testing.assert_close(weight.detach(), before[name] - rate / tokens)
    assert trunk.tokens_through(next(iter(before))) == tokens


def test_weights_that_are_loaded_are_the_trunks(source: MemorySource) -> None:
    trunk = Trunk(parse_federation(SETTINGS, "the test"), source, range(1, 3), torch.device("cpu"))
    name, weight = next(iter(trunk.trainable().items()))
    trunk.load_weights({name: torch.full_like(weight, 7.0), "of nobody": torch.ones(1)})
    assert torch.equal(trunk.weights()[name], torch.full_like(weight, 7.0))
