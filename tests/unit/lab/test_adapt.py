"""A publisher's adaptation: it learns under noise, leaves the bottom alone, and writes what it learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from client_model.records import open_tokenizer, pad_token
from splitfl.cli import app
from splitfl.cut import Cut
from splitfl.data.notes import write_notes
from splitfl.errors import ConfigError
from splitfl.lab.adapt import (
    Adaptation,
    NarrowModel,
    Records,
    adapt,
    evaluate,
    narrow_model,
    open_public,
    public_release,
)
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.narrow import NarrowSpec, load_release

CPU = torch.device("cpu")
QUICK = Adaptation(
    Cut(1, 1), rank=4, noise_multiplier=0.3, ends_steps=15, steps=15, records=4, max_length=48, learning_rate=3e-3
)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("public") / "notes.jsonl"
    write_notes(path, "general", 60, seed=5)
    return path


def test_public_release_clips_each_token_and_adds_the_noise_it_names() -> None:
    spec = NarrowSpec(1, 1, hidden=8, rank=2, noise_multiplier=0.25, clip_norm=2.0)
    long = torch.full((100, 200, 2), 30.0)
    seen = public_release(spec, torch.Generator().manual_seed(0))(long)
    assert torch.allclose(seen.mean((0, 1)), torch.full((2,), 2.0 / 2**0.5), atol=0.02)
    assert float(seen.std(dim=(0, 1)).mean()) == pytest.approx(0.5, rel=0.02)


def losses(model: NarrowModel, records: Records, pad: int) -> float:
    held = [records[index] for index in range(8)]
    return evaluate(model, held, pad, public_release(model.narrow.spec, torch.Generator().manual_seed(9)))


def test_adapting_learns_in_both_stages(small_model: Path, public: Path) -> None:
    tokenizer = open_tokenizer(small_model)
    pad = pad_token(tokenizer)
    records = open_public([public], tokenizer, QUICK.max_length)
    before = losses(narrow_model(small_model, QUICK, CPU), records, pad)
    reached = {}
    for steps in (0, QUICK.steps):
        model = narrow_model(small_model, QUICK, CPU)
        adapt(model, replace(QUICK, steps=steps), records, pad)
        reached[steps] = losses(model, records, pad)
    assert reached[QUICK.steps] < reached[0] < before


def test_bottom_stays_as_it_is_once_the_trunk_has_joined(small_model: Path, public: Path) -> None:
    tokenizer = open_tokenizer(small_model)
    records = open_public([public], tokenizer, QUICK.max_length)
    model = narrow_model(small_model, QUICK, CPU)
    before = {part: [weight.clone() for weight in part.parameters()] for part in (model.bottom, model.trunk, model.top)}
    adapt(model, replace(QUICK, ends_steps=0, steps=2), records, pad_token(tokenizer))
    moved = {
        part: any(not torch.equal(old, new) for old, new in zip(weights, part.parameters(), strict=True))
        for part, weights in before.items()
    }
    assert moved == {model.bottom: False, model.trunk: True, model.top: True}


def test_adapt_writes_a_checkpoint_whose_release_gives_the_same_loss(
    small_model: Path, public: Path, tmp_path: Path
) -> None:
    command = ["adapt", str(small_model), f"{tmp_path}/out", "--public", str(public), "--rank", "4", "--sigma", "0.3"]
    command += ["--ends-steps", "0", "--steps", "5", "--records", "4", "--max-length", "48", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rank"], told["noise_multiplier"], told["steps"]) == (4, 0.3, 5)

    narrow = load_release(tmp_path / "out")
    assert narrow.spec.cut == Cut(1, 1)
    base, adapted = CheckpointFolder(small_model), CheckpointFolder(tmp_path / "out")
    same = {name for name in base.entries if torch.equal(base.read(name).float(), adapted.read(name))}
    assert any(name.startswith("model.layers.0.") for name in same)
    assert not any(name.startswith(("model.layers.1.", "model.layers.2.", "lm_head")) for name in same)

    model = NarrowModel(tmp_path / "out", QUICK.settings(), narrow, CPU)
    tokenizer = open_tokenizer(tmp_path / "out")
    records = open_public([public], tokenizer, QUICK.max_length)
    held = [records[index] for index in range(16)]
    loss = evaluate(model, held, pad_token(tokenizer), public_release(narrow.spec, torch.Generator().manual_seed(1)))
    assert loss == pytest.approx(told["loss"], rel=0.2)


def test_adapt_refuses_a_cut_without_a_trunk(small_model: Path) -> None:
    with pytest.raises(ConfigError, match="no trunk"):
        narrow_model(small_model, Adaptation(Cut(1, 2), rank=4), CPU)


def test_adapt_refuses_a_folder_in_use_before_it_starts(small_model: Path, public: Path) -> None:
    result = CliRunner().invoke(app, ["adapt", str(small_model), str(small_model), "--public", str(public)])
    assert result.exit_code == ConfigError.exit_code
    assert "not empty" in result.stderr
