"""O3 and O4: with SGD and one local step, a round of C clients is one centralised step on the union batch, to 1e-5."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from server_model.exporting import export_state
from splitfl.cut import Cut
from tests.parity.federating import exact_settings, federate
from tests.parity.whole import open_data, train, whole_model

RATE = 0.1


def union_steps(model, notes, settings, count):
    data = {name: open_data(model, path, settings) for name, path in notes.items()}
    orders = {name: data[name].order(name) for name in data}
    return [[batch for name in sorted(data) for batch in data[name].step(orders[name])] for _ in range(count)]


def assert_equals_centralised(model_folder, notes, settings, outcome, out, rounds):
    model = whole_model(model_folder)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    steps = union_steps(model_folder, notes, settings, rounds)
    train(model, steps, torch.optim.SGD(model.parameters(), lr=RATE), [RATE] * rounds)
    export_state(outcome.state, out, client=None, dtype="float32")
    exported = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    for name, weight in model.named_parameters():
        assert (weight - exported[name]).abs().max() < 1e-5, name
        assert not torch.equal(before[name], exported[name]), f"{name} did not move"


@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama"])
def test_round_of_three_clients_equals_one_centralised_step(checkpoint, notes, tmp_path, request):
    model: object = request.getfixturevalue(checkpoint)
    settings = exact_settings(
        rounds={"count": 3, "local_steps": 1, "min_clients": 3},
        optimizer={"name": "sgd", "learning_rate": RATE},
        batch={"records": 4, "max_length": 40, "pack": False},  # clients bring different numbers of label tokens
    )
    outcome = federate(model, notes, settings, tmp_path)
    assert_equals_centralised(model, notes, settings, outcome, tmp_path / "out", 3)


def test_round_of_three_clients_with_different_cuts_equals_one_centralised_step(llama, notes, tmp_path):
    settings = exact_settings(
        rounds={"count": 3, "local_steps": 1, "min_clients": 3},
        optimizer={"name": "sgd", "learning_rate": RATE},
        batch={"records": 4, "max_length": 40, "pack": False},
        model={"n_bottom": 0, "n_top": 0, "max_bottom": 2, "max_top": 3, "freeze_below": 0},
    )
    cuts = dict(zip(sorted(notes), [Cut(0, 0), Cut(2, 1), Cut(1, 3)], strict=True))
    outcome = federate(llama, notes, settings, tmp_path, cuts)
    assert_equals_centralised(llama, notes, settings, outcome, tmp_path / "out", 3)
