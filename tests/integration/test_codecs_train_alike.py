"""What the wire rounds away is nothing to the loss: the demo's rounds with each number format, against fp32."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from splitfl.config import Evaluation, Federation, Privacy, ReleaseSettings, Wire
from splitfl.data.notes import generate_notes, write_notes
from splitfl.lab.demo.scale import CLIENTS, DemoScale
from splitfl.lab.federation import run_federation
from splitfl.split.create import create_checkpoint

pytestmark = pytest.mark.slow  # a minute on an idle machine
WITHIN = {"bf16": 0.005, "fp16": 0.005, "int8": 0.01}


def demo_settings(codec: str) -> Federation:
    """The demo's rounds with privacy off, so that the codec alone changes what the trunk sees."""
    scale = DemoScale(record_tokens=64)
    return scale.federation(seed=0).model_copy(
        update={
            "privacy": Privacy(),
            "release": ReleaseSettings(),
            "evaluation": Evaluation(held_out_fraction=0.1, records=32, every_rounds=0),
            "wire": Wire(codec=codec),  # type: ignore[arg-type]
        }
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codecs")
    texts = generate_notes("general", 300, 0)
    create_checkpoint(folder / "model", family="llama", layers=4, hidden=64, vocab=800, corpus=texts, seed=0)
    for name in CLIENTS:
        write_notes(folder / f"{name}.jsonl", name, 300, 0)
    return folder


@pytest.fixture(scope="module")
def exact(place: Path) -> float:
    return federated_loss(place, "fp32")


def federated_loss(place: Path, codec: str) -> float:
    """Mean held-out loss of the clients after the last round, in nats per token."""
    data = {name: place / f"{name}.jsonl" for name in CLIENTS}
    result = run_federation(place / "model", data, demo_settings(codec), place / f"state-{codec}")
    before, after = (fmean(result.held_out_losses(name)[at][1] for name in CLIENTS) for at in (0, -1))
    assert after < 0.7 * before
    return after


@pytest.mark.parametrize("codec", WITHIN)
def test_loss_after_the_demos_rounds(codec: str, place: Path, exact: float) -> None:
    rounded = federated_loss(place, codec)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=WITHIN[codec])
