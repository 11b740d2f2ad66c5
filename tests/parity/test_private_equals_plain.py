"""With clips that never bite and noise too small to see, a private federation is the plain one: nothing else differs.

So released activations, ids instead of uploads, per-record gradients and DP-SGD are right; with real noise they differ.
AdamW, for it does not mind that private modes divide by public numbers instead of label tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitfl.config import Federation
from tests.parity.federating import Outcome, exact_settings, federate

FAMILIES = ["llama", "tied_llama", "gpt2"]
SILENT = {
    "mode": "measured",
    "clip_norm": 1e6,
    "noise_multiplier": 1e-14,
    "gradients": "noised",
    "gradient_clip_norm": 1e6,
    "gradient_noise_multiplier": 1e-14,
}
SILENT_DP = {"dp_sgd": True, "dp_max_grad_norm": 1e6, "dp_noise_multiplier": 1e-15}
TWO_EPOCHS, FEW = 16, 5  # local steps of two rounds
LOUD_DP = {"dp_sgd": True, "dp_max_grad_norm": 0.01, "dp_noise_multiplier": 5.0}


def settings(privacy: dict[str, Any], model: dict[str, Any], local_steps: int = TWO_EPOCHS) -> Federation:
    return exact_settings(
        rounds={"count": 2, "local_steps": local_steps},
        batch={"records": 4, "micro_batches": 2, "max_length": 24, "pack": False},
        model={"n_bottom": 1, "n_top": 1, **model},
        privacy=privacy,
        evaluation={"records": 8, "every_rounds": 1},
    )


def run(
    model: Path,
    notes: dict[str, Path],
    folder: Path,
    privacy: dict[str, Any],
    *,
    local_steps: int = TWO_EPOCHS,
    **changes: Any,
) -> Outcome:
    """``changes``: of the settings' table ``model``."""
    return federate(model, {"solo": notes["oncology"]}, settings(privacy, changes, local_steps), folder)


@pytest.mark.parametrize("frozen", [1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_private_federation_without_noise_has_the_plain_losses(
    family: str, frozen: int, request: pytest.FixtureRequest, notes: dict[str, Path], tmp_path: Path
) -> None:
    model = request.getfixturevalue(family)
    plain = run(model, notes, tmp_path / "plain", {}, local_steps=FEW, freeze_below=frozen)
    private = run(model, notes, tmp_path / "private", SILENT, local_steps=FEW, freeze_below=frozen)
    assert private.step_losses["solo"] == pytest.approx(plain.step_losses["solo"], rel=1e-3)
    assert plain.step_losses["solo"][-1] < 0.99 * plain.step_losses["solo"][0]
    curves = [[point["loss"] for point in outcome.reports["solo"]["held_out_losses"]] for outcome in (plain, private)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("n_top", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_dp_sgd_that_never_clips_has_the_plain_losses_and_with_noise_it_has_not(
    family: str, n_top: int, request: pytest.FixtureRequest, notes: dict[str, Path], tmp_path: Path
) -> None:
    """``n_top = 4`` leaves the trunk empty. Almost all records fill their block, so both losses weigh alike."""
    model = request.getfixturevalue(family)
    cut = {"n_bottom": 1 if n_top == 1 else 0, "n_top": n_top, "freeze_below": 0}
    plain = run(model, notes, tmp_path / "plain", {}, local_steps=FEW, **cut)
    private = run(model, notes, tmp_path / "private", SILENT | SILENT_DP, local_steps=FEW, **cut)
    noisy = run(model, notes, tmp_path / "noisy", SILENT | LOUD_DP, local_steps=FEW, **cut)
    assert private.step_losses["solo"] == pytest.approx(plain.step_losses["solo"], rel=5e-3)
    assert noisy.step_losses["solo"] != pytest.approx(plain.step_losses["solo"], rel=5e-3)


def test_each_record_is_released_once_and_later_epochs_upload_no_activation(
    llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    outcome = run(llama, notes, tmp_path, SILENT, freeze_below=1)
    report = outcome.reports["solo"]
    left = report["privacy"]["left"]
    records = report["data"]["train_records"]
    assert 2 * records <= 32 * 4  # two epochs at least
    assert left["activations"]["releases"] == records
    assert left["activations of held-out records"]["releases"] == min(8, report["data"]["held_out_records"])
    assert left["gradients"]["releases"] == 32 * 4


@pytest.mark.parametrize("cache_gib", [0.0, 3e-5])
def test_server_without_room_gets_the_same_bytes_in_each_epoch(
    cache_gib: float, llama: Path, notes: dict[str, Path], tmp_path: Path
) -> None:
    roomy = run(llama, notes, tmp_path / "roomy", SILENT, freeze_below=1)
    small = settings(SILENT, {"freeze_below": 1}).model_copy()
    small = small.model_copy(update={"trunk": small.trunk.model_copy(update={"cache_gib": cache_gib})})
    cramped = federate(llama, {"solo": notes["oncology"]}, small, tmp_path / "cramped")
    assert cramped.step_losses["solo"] == pytest.approx(roomy.step_losses["solo"], rel=1e-6)
    left = [outcome.reports["solo"]["privacy"]["left"]["activations"] for outcome in (roomy, cramped)]
    assert left[0] == left[1]  # sending again is free
    sent = [outcome.reports["solo"]["bytes"]["bytes_sent"] for outcome in (roomy, cramped)]
    assert sent[1] > 1.2 * sent[0]
