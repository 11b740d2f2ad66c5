"""A part's optimizer is plain torch on mean gradients, leaves alone what it must, and goes on where it stopped."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from splitfl.split.optimizer import OptimizerSpec, PartOptimizer

TOKENS = {"block.0.weight": 7, "block.1.weight": 3}
SHAPES = {"block.0.weight": (4, 5), "block.1.weight": (6,)}
Name = Literal["adamw", "sgd"]


def spec(name: Name, *, decay: float = 0.1, clip: float = 0.0) -> OptimizerSpec:
    return OptimizerSpec(name=name, weight_decay=decay, betas=(0.9, 0.95), max_grad_norm=clip)


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    """Gradients of a summed loss."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: 5 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def put(named: dict[str, nn.Parameter], step: int) -> None:
    for name, gradient in gradients(step).items():
        named[name].grad = gradient.clone()


def tokens_of(name: str) -> int:
    return TOKENS[name]


def plain(name: Name, parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=decay, foreach=False)


def values(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def copied(part: PartOptimizer) -> dict[str, Tensor]:
    """The part's moments as they are now."""
    return {key: value.clone() for key, value in part.state_tensors().items()}


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_part_steps_as_plain_torch_on_mean_gradients(name: Name, clip: float) -> None:
    named, expected = weights(), weights()
    part = PartOptimizer(named, spec(name, clip=clip))
    reference = plain(name, list(expected.values()), 0.1)
    for step, rate in enumerate([0.1, 0.05, 0.2]):
        put(named, step)
        norm = part.step(rate, tokens_of)
        for key, gradient in gradients(step).items():
            expected[key].grad = gradient / TOKENS[key]
        want = nn.utils.clip_grad_norm_(expected.values(), clip or math.inf)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert norm == pytest.approx(float(want), rel=1e-6)
        for key in SHAPES:
            torch.testing.assert_close(named[key], expected[key], rtol=1e-6, atol=1e-7)
    assert all(parameter.grad is None for parameter in named.values())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_clipped_part_moves_less_than_one_that_is_not(name: Name) -> None:
    """SGD shows that clipping happened at all; Adam's first step is blind to scale, its second is not."""
    ends = []
    for clip in (0.0, 0.01):
        named = weights()
        part = PartOptimizer(named, spec(name, decay=0.0, clip=clip))
        for step in range(2):
            put(named, step)
            part.step(0.1, tokens_of)
        ends.append(values(named))
    assert any(not torch.allclose(ends[0][key], ends[1][key]) for key in SHAPES)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_that_no_token_crossed_does_not_move(name: Name) -> None:
    named = weights()
    part = PartOptimizer(named, spec(name))
    put(named, 0)
    part.step(0.1, tokens_of)  # moments that would carry it on
    before, moments = values(named), copied(part)
    put(named, 1)
    named["block.0.weight"].grad = torch.zeros(4, 5)
    part.step(0.1, lambda key: 0 if key == "block.0.weight" else 3)
    assert torch.equal(named["block.0.weight"], before["block.0.weight"])
    assert not torch.equal(named["block.1.weight"], before["block.1.weight"])
    for key, value in part.state_tensors().items():
        assert torch.equal(value, moments[key]) == key.startswith("block.0.")


def test_part_without_any_gradient_stays_where_it_is() -> None:
    named = weights()
    before = values(named)
    assert PartOptimizer(named, spec("adamw")).step(0.1, tokens_of) == 0.0
    assert all(torch.equal(named[key], before[key]) for key in SHAPES)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_step_that_is_not_finite_moves_nothing(name: Name, bad: float, clip: float) -> None:
    named = weights()
    part = PartOptimizer(named, spec(name, clip=clip))
    put(named, 0)
    part.step(0.1, tokens_of)
    before, moments = values(named), copied(part)
    put(named, 1)
    gradient = named["block.1.weight"].grad
    assert gradient is not None
    gradient[2] = bad
    assert not math.isfinite(part.step(0.1, tokens_of))
    assert all(torch.equal(named[key], before[key]) for key in SHAPES)
    assert all(torch.equal(value, moments[key]) for key, value in part.state_tensors().items())
    assert all(parameter.grad is None for parameter in named.values())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_restored_part_goes_on_as_if_undisturbed(name: Name) -> None:
    named = weights()
    part = PartOptimizer(named, spec(name, clip=0.5))
    for step in range(2):
        put(named, step)
        part.step(0.1, tokens_of)
    state = copied(part)
    twin = {key: nn.Parameter(value) for key, value in values(named).items()}
    restored = PartOptimizer(twin, spec(name, clip=0.5))
    restored.load_state_tensors(state)
    for step in range(2, 5):
        for each, owner in ((named, part), (twin, restored)):
            put(each, step)
            owner.step(0.1, tokens_of)
        assert all(torch.equal(named[key], twin[key]) for key in SHAPES)


def test_state_that_is_handed_out_takes_no_memory_of_its_own() -> None:
    named = weights()
    part = PartOptimizer(named, spec("adamw"))
    put(named, 0)
    part.step(0.1, tokens_of)
    once, again = part.state_tensors(), part.state_tensors()
    assert all(once[key].data_ptr() == again[key].data_ptr() for key in once)


def test_state_goes_under_the_names_of_the_weights() -> None:
    named = weights()
    part = PartOptimizer(named, spec("adamw"))
    assert part.state_tensors() == {}
    put(named, 0)
    part.step(0.1, tokens_of)
    moments = ("step", "exp_avg", "exp_avg_sq")
    assert part.state_tensors().keys() == {f"{key}/{moment}" for key in SHAPES for moment in moments}


def test_state_that_is_loaded_is_copied() -> None:
    named = weights()
    part = PartOptimizer(named, spec("adamw"))
    put(named, 0)
    part.step(0.1, tokens_of)
    state = copied(part)
    kept = {key: value.clone() for key, value in state.items()}
    other = PartOptimizer(weights(), spec("adamw"))
    other.load_state_tensors(state)
    for owner in (part, other):
        put(owner.named, 1)
        owner.step(0.1, tokens_of)
    assert all(torch.equal(state[key], kept[key]) for key in kept)


def test_newly_held_weight_starts_from_zero_and_others_keep_their_moments() -> None:
    named = weights()
    part = PartOptimizer(named, spec("adamw"))
    put(named, 0)
    part.step(0.1, tokens_of)
    state = {key: value for key, value in part.state_tensors().items() if key.startswith("block.0.")}
    wider = PartOptimizer(weights(), spec("adamw"))
    wider.load_state_tensors(state | {"block.9.weight/exp_avg": torch.ones(1)})
    assert wider.state_tensors().keys() == state.keys()
    put(wider.named, 1)
    wider.step(0.1, tokens_of)
    steps = {key: float(value) for key, value in wider.state_tensors().items() if key.endswith("/step")}
    assert steps == {"block.0.weight/step": 2.0, "block.1.weight/step": 1.0}


def test_clear_drops_what_was_accumulated() -> None:
    named = weights()
    part = PartOptimizer(named, spec("sgd"))
    put(named, 0)
    part.clear()
    before = values(named)
    part.step(0.1, tokens_of)
    assert all(torch.equal(named[key], before[key]) for key in SHAPES)


def test_part_that_trains_nothing_does_nothing() -> None:
    part = PartOptimizer({}, spec("adamw"))
    assert part.step(0.1, tokens_of) == 0.0
    part.clear()
    part.load_state_tensors({"block.0.weight/step": torch.ones(())})
    assert part.state_tensors() == {}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_correction_is_added_after_division_and_clipping(name: Name) -> None:
    named, expected = weights(), weights()
    part = PartOptimizer(named, spec(name, clip=0.5))
    reference = plain(name, list(expected.values()), 0.1)
    for step in range(3):
        put(named, step)
        part.step(0.1, tokens_of, lambda key, weight: 2 * weight if key == "block.0.weight" else None)
        for key, gradient in gradients(step).items():
            expected[key].grad = gradient / TOKENS[key]
        nn.utils.clip_grad_norm_(expected.values(), 0.5)
        first = expected["block.0.weight"]
        assert first.grad is not None
        first.grad += 2 * first.detach()
        reference.param_groups[0]["lr"] = 0.1
        reference.step()
        for key in SHAPES:
            torch.testing.assert_close(named[key], expected[key], rtol=1e-6, atol=1e-7)


def test_correction_moves_no_weight_that_no_token_crossed() -> None:
    named = weights()
    before = values(named)
    put(named, 0)
    PartOptimizer(named, spec("sgd")).step(0.1, lambda _: 0, lambda _, weight: weight)
    assert all(torch.equal(named[key], before[key]) for key in SHAPES)


def test_fused_step_stays_for_those_without_a_correction() -> None:
    for correction in (None, lambda _, weight: 0 * weight):
        named = weights()
        part = PartOptimizer(named, spec("adamw"))
        put(named, 0)
        part.step(0.1, lambda _: 5, correction)
        assert (part._optimizer.grad_scale is not None) == (correction is None)  # type: ignore[union-attr]
