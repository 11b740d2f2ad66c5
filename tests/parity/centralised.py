"""The yardstick of O3 and O4: steps of the whole model on the union of all clients' batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from server_model.exporting import export_state
from splitfl.config import Federation
from splitfl.data.packing import Batch
from tests.parity.federating import Outcome, exact_settings
from tests.parity.whole import open_data, train, whole_model

RATE = 0.1


def sgd_settings(rounds: int, **tables: object) -> Federation:
    """One step of plain SGD a round, three clients, which bring different numbers of label tokens."""
    return exact_settings(
        rounds={"count": rounds, "local_steps": 1, "min_clients": 3},
        optimizer={"name": "sgd", "learning_rate": RATE},
        batch={"records": 4, "max_length": 40, "pack": False},
        **tables,
    )


def union_steps(model: Path, notes: Mapping[str, Path], settings: Federation) -> list[list[Batch]]:
    """What all clients together train on in each round."""
    data = {name: open_data(model, path, settings) for name, path in notes.items()}
    orders = {name: data[name].order(name) for name in data}
    rounds = range(settings.rounds.count)
    return [[batch for name in sorted(data) for batch in data[name].step(orders[name])] for _ in rounds]


def train_centralised(model: nn.Module, folder: Path, notes: Mapping[str, Path], settings: Federation) -> None:
    """One SGD step a round of ``model``, which is the checkpoint in ``folder``, on the union batches."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    train(model, union_steps(folder, notes, settings), optimizer, [RATE] * settings.rounds.count)


def exported(outcome: Outcome, out: Path) -> dict[str, Tensor]:
    """The federation's model as plain transformers reads it."""
    export_state(outcome.state, out, client=None, dtype="float32")
    return dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())


def assert_equals_centralised(
    folder: Path, notes: Mapping[str, Path], settings: Federation, outcome: Outcome, out: Path
) -> None:
    """Every weight moved, and to where the centralised steps take it, to 1e-5."""
    model = whole_model(folder)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_centralised(model, folder, notes, settings)
    federated = exported(outcome, out)
    for name, weight in model.named_parameters():
        assert (weight - federated[name]).abs().max() < 1e-5, name
        assert not torch.equal(before[name], federated[name]), f"{name} did not move"
