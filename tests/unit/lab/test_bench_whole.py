"""The whole model that benchmarks compare with: what it trains, and that its process is an ordinary one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from splitfl.errors import SplitFLError
from splitfl.lab.bench.overhead import random_batch
from splitfl.lab.bench.whole import WholeProcess, WholeStep, ordinary_environment
from splitfl.spinning import BRIEF_SPINS


def test_whole_model_freezes_what_the_split_freezes(tiny_llama: Path) -> None:
    whole = WholeStep(tiny_llama, fused=None, frozen=1)
    before = {name: weight.clone() for name, weight in whole.model.named_parameters()}
    whole(random_batch(2, 16, 300))
    still = {name for name, weight in whole.model.named_parameters() if torch.equal(before[name], weight)}
    assert still == {name for name in before if name.startswith(("model.embed_tokens.", "model.layers.0."))}


def test_process_takes_the_same_steps(tiny_llama: Path) -> None:
    batches = [random_batch(2, 16, 300, seed) for seed in range(3)]
    here = WholeStep(tiny_llama, fused=True)
    losses = [here(batch)[1] for batch in batches]
    with closing(WholeProcess(tiny_llama, fused=True)) as elsewhere:
        first, (second,) = elsewhere(batches[:2]), elsewhere(batches[2:])
    assert [loss for _, loss in [*first, second]] == pytest.approx(losses, rel=1e-5)
    assert all(seconds > 0 for seconds, _ in [*first, second])


def test_process_that_cannot_load_is_no_riddle(tmp_path: Path) -> None:
    with closing(WholeProcess(tmp_path / "none", fused=None)) as whole, pytest.raises(SplitFLError, match="has ended"):
        whole([random_batch(2, 16, 300)])


def test_its_threads_wait_as_nobody_has_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", BRIEF_SPINS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    ordinary = ordinary_environment()
    assert "GOMP_SPINCOUNT" not in ordinary
    assert ordinary["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert ordinary_environment()["GOMP_SPINCOUNT"] == "7"
