"""Several micro-batches under way at once change when things are computed, and nothing of what is computed."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future

import pytest
import torch

from client_model.trainer import Awaits, in_turn
from splitfl.codec.tensors import decode_tensor
from tests.parity.federating import exact_settings, federate


def losses_with(in_flight, model, notes, folder):
    settings = exact_settings(
        rounds={"count": 2, "local_steps": 3},
        batch={"records": 8, "micro_batches": 4, "max_length": 40, "pack": False, "in_flight": in_flight},
        model={"n_bottom": 1, "n_top": 1, "freeze_below": 0},
        trunk={"max_tokens_in_flight": 2 * 2 * 40},  # room for two: the others wait for it
    )
    outcome = federate(model, {"solo": notes["oncology"]}, settings, folder)
    return outcome.step_losses["solo"]


@pytest.mark.parametrize("in_flight", [2, 3, 32])
def test_window_changes_no_loss_by_a_bit(in_flight, llama, notes, tmp_path):
    one_by_one = losses_with(1, llama, notes, tmp_path / "one")
    together = losses_with(in_flight, llama, notes, tmp_path / "more")
    assert together == one_by_one
    assert len(together) == 6


def test_no_micro_batch_overtakes_another_at_the_server(llama, notes, tmp_path, monkeypatch):
    calls = itertools.count()

    def now_and_then_slow(*args, **kwargs):
        time.sleep(0.05 * (next(calls) % 3 == 0))
        return decode_tensor(*args, **kwargs)

    monkeypatch.setattr("server_model.coordinator.decode_tensor", now_and_then_slow)
    assert len(losses_with(2, llama, notes, tmp_path)) == 6


@pytest.mark.parametrize("in_flight", [1, 2, 3, 5, 9])
def test_requests_are_awaited_in_the_order_in_which_they_were_made(in_flight):
    made, awaited, open_now, inside, most, most_inside = [], [], set(), set(), 0, 0

    def crossing(number):
        nonlocal most, most_inside
        open_now.add(number)
        most = max(most, len(open_now))
        for hop, awaits in enumerate(Awaits):
            made.append((number, hop))
            inside.add(number) if hop == 0 else inside.discard(number)
            most_inside = max(most_inside, len(inside))
            yield awaits
            awaited.append((number, hop))
        open_now.discard(number)

    list(in_turn((crossing(number) for number in range(5)), in_flight))
    assert awaited == made
    assert len(awaited) == 10
    assert most_inside == min(in_flight, 5)
    assert most == min(2 * in_flight - 1, 5)


def test_next_micro_batch_follows_each_gradient_at_once():
    """The way up is never empty for want of an answer to a gradient, which brings the top nothing."""
    made = []

    def crossing(number):
        for awaits in Awaits:
            made.append(f"{awaits.name} {number}")
            yield awaits

    list(in_turn((crossing(number) for number in range(4)), 2))
    assert made[:4] == ["OUTPUT 0", "OUTPUT 1", "GRADIENT 0", "OUTPUT 2"]
    assert made[4:] == ["GRADIENT 1", "OUTPUT 3", "GRADIENT 2", "GRADIENT 3"]


def test_failure_of_one_micro_batch_ends_the_step():
    reply: Future[torch.Tensor] = Future()
    reply.set_exception(ValueError("lost"))

    def crossing():
        yield Awaits.OUTPUT
        reply.result()

    with pytest.raises(ValueError, match="lost"):
        list(in_turn([crossing(), crossing()], 2))
