"""A trunk that runs forwards again instead of keeping their graphs computes the same numbers, whatever the cuts."""

from __future__ import annotations

import torch

from tests.parity.centralised import exported, sgd_settings
from tests.parity.federating import Outcome, federate
from tests.parity.test_o4_different_cuts import ANY_CUT, DIFFERENT


def test_recompute_changes_no_bit_of_losses_or_weights(llama, notes, tmp_path):
    def ran(recompute: bool) -> tuple[Outcome, dict[str, torch.Tensor]]:
        settings = sgd_settings(3, model=ANY_CUT, trunk={"recompute": recompute})
        folder = tmp_path / str(recompute)
        outcome = federate(llama, notes, settings, folder, dict(zip(sorted(notes), DIFFERENT, strict=True)))
        return outcome, exported(outcome, folder / "out")

    (kept, weights), (again, same) = ran(False), ran(True)
    assert kept.step_losses == again.step_losses
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
