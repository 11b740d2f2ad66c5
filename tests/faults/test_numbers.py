"""Numbers that are none: the step is refused and named, and training goes on for everybody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import SETTINGS
from processes import Place, with_settings
from raw_client import RawClient
from torch import Tensor

from splitfl.wire.messages import Backward, Bye, Failed, Gradient, Hidden, RoundOpen, StepMissed

STEPS = 4
FEW = with_settings(SETTINGS, rounds={"count": 1, "local_steps": STEPS})
SHAPE = (4, 32, 64)


def spoiled(value: float) -> Tensor:
    tensor = torch.zeros(SHAPE)
    tensor[1, 2, 3] = value
    return tensor


def spoil_activations(client: RawClient, step: int, value: float) -> Failed:
    answer = client.forward(0, step, spoiled(value))
    assert isinstance(answer, Failed), answer
    assert "hidden" in answer.reason
    return answer


def spoil_gradients(client: RawClient, step: int, value: float) -> Failed:
    answer = client.forward(0, step, torch.randn(SHAPE))
    assert isinstance(answer, Hidden), answer
    answer = client.backward(0, step, spoiled(value))
    assert isinstance(answer, Failed), answer
    assert "gradient" in answer.reason
    return answer


@pytest.mark.parametrize("spoil", [spoil_activations, spoil_gradients])
def test_client_that_sends_nan_is_refused_and_named_while_the_other_trains(
    place: Place, wards: dict[str, Path], spoil: Callable[[RawClient, int, float], Failed]
) -> None:
    server = place.serve(FEW)
    good = place.join(server.url, "a", wards["a"])
    with RawClient(server.url, "mallory") as bad:
        assert isinstance(bad.next_round(), RoundOpen)
        for step, value in enumerate([torch.nan, torch.inf, -torch.inf]):
            answer = spoil(bad, step, value)
            assert answer.code == "bad_tensor"
            assert "NaN or infinity" in answer.reason
            told = server.command.wait_for("sat_out", client="mallory", step=step)
            assert "NaN or infinity" in told["reason"]
        # the next step is sound, and counts
        assert isinstance(bad.forward(0, 3, torch.randn(SHAPE)), Hidden)
        assert isinstance(bad.backward(0, 3, torch.randn(SHAPE)), Gradient)
        bad.ask(Bye(0, 0, "failed"))
    assert [good.wait(), server.command.wait()] == [0, 0], good.story()
    assert len(good.named("step")) == STEPS
    assert not good.named("step_missed")


def test_client_that_is_refused_in_a_step_misses_the_rest_of_it(place: Place) -> None:
    server = place.serve(with_settings(FEW, rounds={"min_clients": 1}, batch={"micro_batches": 2, "records": 8}))
    with RawClient(server.url, "mallory") as bad:
        bad.next_round()
        assert isinstance(bad.forward(0, 0, torch.randn(SHAPE)), Hidden)
        assert isinstance(bad.backward(0, 0, torch.randn(SHAPE)), Gradient)
        answer = bad.forward(0, 0, spoiled(torch.nan), micro=1)
        assert isinstance(answer, Failed)
        assert isinstance(bad.forward(0, 0, torch.randn(SHAPE), micro=1), StepMissed)
        assert isinstance(bad.forward(0, 1, torch.randn(SHAPE)), Hidden)


def test_evaluation_with_nan_costs_no_step(place: Place) -> None:
    server = place.serve(with_settings(FEW, rounds={"min_clients": 1}))
    with RawClient(server.url, "mallory") as bad:
        bad.next_round()
        assert isinstance(bad.forward(0, 0, spoiled(torch.nan), train=False), Failed)
        assert isinstance(bad.forward(0, 0, torch.randn(SHAPE)), Hidden)


def test_gradient_of_a_shape_that_lies_is_refused_and_the_right_one_taken(place: Place) -> None:
    server = place.serve(with_settings(FEW, rounds={"min_clients": 1}))
    with RawClient(server.url, "mallory") as bad:
        bad.next_round()
        bad.forward(0, 0, torch.randn(SHAPE))
        for shape in ((4, 31, 64), (1, 1, 64), (4, 32, 63), (4, 32)):
            answer = bad.backward(0, 0, torch.zeros(shape))
            assert isinstance(answer, Failed)
            assert answer.code == "bad_message"
        assert isinstance(bad.backward(0, 0, torch.randn(SHAPE)), Gradient)
        assert isinstance(bad.ask(Backward(0, 0, 0, 0, 0, wire_of(SHAPE))), StepMissed)  # that was the last one


def wire_of(shape: tuple[int, ...]) -> Any:
    from raw_client import wire

    return wire(torch.zeros(shape))


def test_client_whose_weights_overflow_says_so_and_the_federation_ends(place: Place, wards: dict[str, Path]) -> None:
    settings = with_settings(
        FEW,
        rounds={"min_clients": 1},
        optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0, "schedule": "constant"},
    )
    server = place.serve(settings)
    client = place.join(server.url, "a", wards["a"])
    assert client.wait() == 0, client.story()
    assert server.command.wait() == 0, server.command.story()
    missed = client.named("step_missed")
    assert missed
    assert "NaN or infinity" in missed[0]["reason"]
    assert client.named("evaluation_failed", round=1)
    assert "Traceback" not in client.stderr + server.command.stderr
