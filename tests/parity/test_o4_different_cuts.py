"""O4: O3 holds with every client on a different cut, nothing frozen, also when cuts change between rounds.

A block is merged over all that trained a copy of it, the server's copy with the tokens that went through it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitfl.cut import Cut
from splitfl.split.training import initial_a
from tests.parity.centralised import assert_equals_centralised, exported, sgd_settings, train_centralised
from tests.parity.federating import federate
from tests.parity.whole import whole_model

ANY_CUT = {"n_bottom": 0, "n_top": 0, "max_bottom": 2, "max_top": 5, "freeze_below": 0}
DIFFERENT = [Cut(0, 0), Cut(2, 1), Cut(1, 3)]
ONE_WITHOUT_TRUNK = [Cut(0, 0), Cut(0, 5), Cut(2, 1)]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama"])
def test_round_of_three_cuts_equals_one_centralised_step(checkpoint, rounds, notes, tmp_path, request):
    model = request.getfixturevalue(checkpoint)
    settings = sgd_settings(rounds, model=ANY_CUT)
    outcome = federate(model, notes, settings, tmp_path, dict(zip(sorted(notes), DIFFERENT, strict=True)))
    assert_equals_centralised(model, notes, settings, outcome, tmp_path / "out")


def test_round_with_a_client_that_holds_all_blocks_equals_one_centralised_step(llama, notes, tmp_path):
    settings = sgd_settings(2, model=ANY_CUT)
    outcome = federate(llama, notes, settings, tmp_path, dict(zip(sorted(notes), ONE_WITHOUT_TRUNK, strict=True)))
    assert_equals_centralised(llama, notes, settings, outcome, tmp_path / "out")


def test_clients_that_change_their_cut_between_rounds_equal_centralised_steps(llama, notes, tmp_path):
    settings = sgd_settings(4, model=ANY_CUT)
    plans = [
        [Cut(0, 0), Cut(2, 2), Cut(1, 0), Cut(1, 0)],  # takes blocks on, gives some back, stops and keeps its cut
        [Cut(2, 1), Cut(0, 3), Cut(0, 5)],  # from a deep bottom to a deep top to no trunk at all
        Cut(1, 3),
    ]
    outcome = federate(llama, notes, settings, tmp_path, dict(zip(sorted(notes), plans, strict=True)))
    assert_equals_centralised(llama, notes, settings, outcome, tmp_path / "out")
    reports = [outcome.reports[name] for name in sorted(notes)]
    assert [report["starts"] for report in reports] == [4, 3, 1]
    assert [report["rounds_taken"] for report in reports] == [4, 4, 4]
    assert all(report["uncounted_starts"] == 0 for report in reports)


class Adapted(nn.Module):
    """A linear layer plus scale * B A, written plainly; B starts at zero."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, scale: float, *, train_a: bool) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(a, requires_grad=train_a)  # (rank, inputs)
        self.b = nn.Parameter(torch.zeros(linear.out_features, a.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)

    def folded(self) -> torch.Tensor:
        return self.linear.weight + self.scale * self.b @ self.a


def adapt(model: nn.Module, trunk_only: range, settings) -> dict[str, Adapted]:
    """Freeze ``model`` and adapt every linear layer, with the federation's A; A trains where the trunk alone is."""
    model.requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = {}
    for name, linear in layers.items():
        shape = torch.Size([settings.model.lora_rank, linear.in_features])
        a = initial_a(f"{name}.lora_A.default.weight", shape, settings.seed)
        block = int(name.split(".")[2]) if ".layers." in name else -1
        scale = settings.model.lora_alpha / settings.model.lora_rank
        adapted[name] = Adapted(linear, a, scale, train_a=block in trunk_only)
        model.set_submodule(name, adapted[name])
    return adapted


LORA = {"train": "lora", "head": "lora", "lora_rank": 4}


@pytest.mark.parametrize(
    ("limits", "cuts", "trunk_only"),
    [
        ({"max_bottom": 2, "max_top": 3}, DIFFERENT, range(0)),
        ({"max_bottom": 1, "max_top": 2}, [Cut(0, 0), Cut(1, 1), [Cut(0, 2), Cut(1, 0)]], range(1, 3)),
    ],
    ids=["all blocks at some client", "two blocks in the trunk alone"],
)
def test_lora_with_one_frozen_a_equals_centralised_lora(limits, cuts, trunk_only, llama, notes, tmp_path):
    settings = sgd_settings(3, model={**ANY_CUT, **LORA, **limits})
    outcome = federate(llama, notes, settings, tmp_path, dict(zip(sorted(notes), cuts, strict=True)))
    model = whole_model(llama)
    adapted = adapt(model, trunk_only, settings)
    train_centralised(model, llama, notes, settings)
    federated = exported(outcome, tmp_path / "out")
    for name, layer in adapted.items():
        found = federated[f"{name}.weight"]
        assert (layer.folded() - found).abs().max() < 1e-5, name
        assert (layer.linear.weight - found).abs().max() > 1e-5, f"{name} did not move"
