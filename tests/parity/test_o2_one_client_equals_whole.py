"""O2: one client through a real websocket, no noise, fp32: its losses are whole-model training's, to 1e-6."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from splitfl.data.packing import DataOrder
from tests.parity.federating import exact_settings, federate
from tests.parity.whole import freeze, open_data, train, whole_model

ROUNDS = {"rounds": {"count": 3, "local_steps": 4}}


def steps_of(data, count):
    order: DataOrder = data.order("solo")
    return [data.step(order) for _ in range(count)]


@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_client_repeats_whole_model_losses_when_everything_trains(checkpoint, optimizer, notes, tmp_path, request):
    model_folder: Path = request.getfixturevalue(checkpoint)
    rate = 1e-3 if optimizer == "adamw" else 0.05
    settings = exact_settings(**ROUNDS, optimizer={"name": optimizer, "learning_rate": rate})
    outcome = federate(model_folder, {"solo": notes["cardiology"]}, settings, tmp_path)

    data = open_data(model_folder, notes["cardiology"], settings)
    model = whole_model(model_folder)
    make = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    reference = train(model, steps_of(data, 12), make(model.parameters(), weight_decay=0.0), [rate] * 12)
    assert outcome.step_losses["solo"] == pytest.approx(reference, abs=1e-6)
    assert reference[-1] < reference[0] - 0.01  # it did train


class TwoOptimizers:
    """AdamW for the trunk, SGD for the rest, as one optimizer whose step size is AdamW's."""

    def __init__(self, model: torch.nn.Module, trunk: tuple[str, ...], rate: float) -> None:
        named = dict(model.named_parameters())
        inside = [weight for name, weight in named.items() if name.startswith(trunk)]
        outside = [weight for name, weight in named.items() if not name.startswith(trunk)]
        self.trunk = torch.optim.AdamW(inside, weight_decay=0.0)
        self.rest = torch.optim.SGD(outside, lr=rate)
        self.param_groups = self.trunk.param_groups

    def zero_grad(self) -> None:
        self.trunk.zero_grad()
        self.rest.zero_grad()

    def step(self) -> None:
        self.trunk.step()
        self.rest.step()


def test_clients_weights_move_by_an_optimizer_of_their_own(llama, notes, tmp_path):
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "client_name": "sgd", "client_learning_rate": 0.05}
    settings = exact_settings(**ROUNDS, optimizer=optimizer)
    outcome = federate(llama, {"solo": notes["cardiology"]}, settings, tmp_path)

    data = open_data(llama, notes["cardiology"], settings)
    model = whole_model(llama)
    layers = model.config.num_hidden_layers
    trunk = tuple(f"model.layers.{block}." for block in settings.cut.trunk(layers))
    both = TwoOptimizers(model, trunk, 0.05)
    reference = train(model, steps_of(data, 12), both, [1e-3] * 12)
    assert outcome.step_losses["solo"] == pytest.approx(reference, abs=1e-6)
    assert reference[-1] < reference[0] - 0.01


def test_client_repeats_whole_model_losses_with_frozen_bottom_padding_micro_batches_and_cosine(llama, notes, tmp_path):
    settings = exact_settings(
        **ROUNDS,
        batch={"records": 4, "micro_batches": 2, "max_length": 40, "pack": False},
        model={"n_bottom": 1, "n_top": 2, "freeze_below": None},
        optimizer={"schedule": "cosine", "warmup_steps": 3},
    )
    outcome = federate(llama, {"solo": notes["oncology"]}, settings, tmp_path)

    data = open_data(llama, notes["oncology"], settings)
    model = whole_model(llama)
    freeze(model, ["model.embed_tokens", "model.layers.0."])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [1e-3 * (n + 1) / 3 for n in range(3)]
    rates += [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 9))) for n in range(9)]
    reference = train(model, steps_of(data, 12), torch.optim.AdamW(trainable, weight_decay=0.0), rates)
    assert outcome.step_losses["solo"] == pytest.approx(reference, abs=1e-6)


@pytest.mark.parametrize("cut", [(0, 0), (2, 3), (0, 5)])
def test_client_repeats_whole_model_losses_at_any_cut(cut, llama, notes, tmp_path):
    settings = exact_settings(**ROUNDS, model={"n_bottom": cut[0], "n_top": cut[1], "freeze_below": 0})
    outcome = federate(llama, {"solo": notes["cardiology"]}, settings, tmp_path)

    data = open_data(llama, notes["cardiology"], settings)
    model = whole_model(llama)
    reference = train(model, steps_of(data, 12), torch.optim.AdamW(model.parameters(), weight_decay=0.0), [1e-3] * 12)
    assert outcome.step_losses["solo"] == pytest.approx(reference, abs=1e-6)
