"""The ends: DP-SGD is on where it was asked for, or they are not made at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gates import open_gate
from transformers import AutoModelForCausalLM

from client_model.ends import Ends
from client_model.trainer import Trainer
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.privacy.dp_sgd import check_precision
from splitfl.privacy.noise import NoiseStream
from splitfl.privacy.policy import DpSgd
from splitfl.split.checkpoint import CheckpointFolder

CPU = torch.device("cpu")


def ends(model: Path, dp_sgd: DpSgd | None, noise: NoiseStream | None) -> Ends:
    return Ends(CheckpointFolder(model), Federation(), Cut(1, 1), CPU, dp_sgd, noise)


def test_dp_sgd_without_noise_is_refused(small_model: Path) -> None:
    """They would train without DP while the gate marks their weights as paid for."""
    with pytest.raises(ValueError, match="without noise"):
        ends(small_model, DpSgd(1.0, 1.0), None)


def test_both_parts_train_privately_where_that_was_asked_for(small_model: Path) -> None:
    private, plain = ends(small_model, DpSgd(1.0, 1.0), NoiseStream()), ends(small_model, None, NoiseStream())
    assert None not in (private.private_top, private.private_bottom)
    assert (plain.private_top, plain.private_bottom) == (None, None)


def test_half_precision_is_widened_for_dp_sgd_whatever_the_settings_say(small_model: Path, tmp_path: Path) -> None:
    """Per-record norms need fp32. A part that would compute in less is refused when the ends are made (its own test),
    before a round is asked for; so the ends must never make one."""
    AutoModelForCausalLM.from_pretrained(small_model).bfloat16().save_pretrained(tmp_path)
    settings = parse_federation({"model": {"compute": "bf16"}}, "the test")
    private = Ends(CheckpointFolder(tmp_path), settings, Cut(1, 1), CPU, DpSgd(1.0, 1.0), NoiseStream())
    assert {weight.dtype for weight in private.top.parameters()} == {torch.float32}
    check_precision(private.bottom)


@pytest.mark.parametrize(("dp_sgd", "in_flight"), [(None, 2), (DpSgd(1.0, 1.0), 1)])
def test_micro_batches_of_dp_sgd_go_one_after_another(
    small_model: Path, tmp_path: Path, dp_sgd: DpSgd | None, in_flight: int
) -> None:
    parts = ends(small_model, dp_sgd, NoiseStream())
    trainer = Trainer(parts, None, open_gate(tmp_path))  # type: ignore[arg-type]
    assert parts.settings.batch.in_flight == 2
    assert trainer.in_flight == in_flight
