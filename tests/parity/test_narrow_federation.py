"""A federation through a narrow release is the publisher's model in three processes: the same loss, noise aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitfl.errors import ConfigError
from splitfl.lab.adapt import Adaptation, NarrowModel, publish
from splitfl.split.narrow import load_release
from tests.parity.federating import exact_settings, federate

CPU = torch.device("cpu")
RANK = 8


@pytest.fixture(scope="module")
def published(llama: Path, notes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a narrow release at Cut(1, 1), adapted for a moment."""
    out = tmp_path_factory.mktemp("published") / "model"
    from splitfl.cut import Cut

    adaptation = Adaptation(
        cut=Cut(1, 1), rank=RANK, noise_multiplier=0.3, ends_steps=4, steps=4, records=4, max_length=24
    )
    publish(llama, out, [notes["cardiology"]], adaptation, CPU)
    return out


def settings(**privacy: Any) -> Any:
    chosen = {"mode": "measured", "noise_multiplier": 1e-12} | privacy
    return exact_settings(
        rounds={"count": 1, "local_steps": 12},
        batch={"records": 4, "max_length": 24, "pack": False},
        model={"n_bottom": 1, "n_top": 1, "freeze_below": 1},
        release={"rank": RANK},
        privacy=chosen,
        evaluation={"records": 8, "every_rounds": 1},
    )


def test_first_loss_is_that_of_the_publishers_model(published: Path, notes: dict[str, Path], tmp_path: Path) -> None:
    outcome = federate(published, {"solo": notes["oncology"]}, settings(), tmp_path)
    report = outcome.reports["solo"]
    whole = NarrowModel(published, settings(), load_release(published), CPU)
    from client_model.records import ClientData, open_tokenizer

    data = ClientData.open(notes["oncology"], settings(), open_tokenizer(published))
    with torch.no_grad():
        clip = load_release(published).spec.clip_norm
        from splitfl.privacy.mechanism import clip_tokens

        losses = [whole.loss(batch, lambda encoded: clip_tokens(encoded, clip)) for batch in data.evaluation()]
    expected = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    curve = [point["loss"] for point in report["held_out_losses"]]
    assert curve[0] == pytest.approx(expected, rel=1e-4)
    assert curve[-1] < curve[0]
    left = report["privacy"]["left"]["activations"]
    assert left["bytes"] <= left["releases"] * 32 * RANK * 4  # r numbers a token leave, and no more


@pytest.mark.parametrize("dp_sgd", [False, True])
def test_gradients_flow_through_the_skip_into_the_trunk(
    published: Path, notes: dict[str, Path], tmp_path: Path, dp_sgd: bool
) -> None:
    silent = {"gradients": "noised", "gradient_clip_norm": 1e6, "gradient_noise_multiplier": 1e-14}
    dp = {"dp_sgd": True, "dp_max_grad_norm": 1e6, "dp_noise_multiplier": 1e-15} if dp_sgd else {}
    outcome = federate(published, {"solo": notes["oncology"]}, settings(**silent, **dp), tmp_path)
    trunk = outcome.coordinator.engine.trunk
    moved = trunk.weights()
    trunk.reset()
    assert any(not torch.equal(weight, moved[name]) for name, weight in trunk.weights().items())


def test_rank_that_the_model_has_not_is_refused_at_the_start(published: Path, llama: Path, tmp_path: Path) -> None:
    from server_model.coordinator import Coordinator

    other = settings().model_copy(update={"release": settings().release.model_copy(update={"rank": 4})})
    with pytest.raises(ConfigError, match=r"rank 8 at cut 1,1"):
        Coordinator(published, other, tmp_path / "a", device=CPU)
    from splitfl.errors import CheckpointError

    with pytest.raises(CheckpointError, match="splitfl adapt"):
        Coordinator(llama, settings(), tmp_path / "b", device=CPU)
