"""``splitfl audit`` on what a run really released: the truth beside it, and the sentence in the next report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing

from splitfl.cli import app
from splitfl.config import Federation, parse_federation
from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import ConfigError, PrivacyError
from splitfl.lab.audit.kept import load_observed
from splitfl.lab.federation import FederationResult, run_federation
from splitfl.split.checkpoint import CheckpointFolder, load_segment
from splitfl.split.create import create_checkpoint
from splitfl.split.segment import Piece


def settings(**privacy: Any) -> Federation:
    tables: dict[str, Any] = {
        "rounds": {"count": 1, "local_steps": 12},
        "batch": {"records": 4, "max_length": 32},
        "evaluation": {"records": 2, "baselines": "none"},
        "wire": {"codec": "fp32"},
        "privacy": {"mode": "measured", "clip_norm": 1e6, "noise_multiplier": 1e-13, "audit_records": 5} | privacy,
    }
    return parse_federation(tables, "the test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    create_checkpoint(
        folder, family="llama", layers=3, hidden=64, vocab=320, corpus=generate_notes("general", 60, 7), seed=0
    )
    return folder


def run(model: Path, folder: Path, chosen: Federation) -> tuple[FederationResult, Path]:
    folder.mkdir(exist_ok=True)
    write_notes(folder / "a.jsonl", "cardiology", 30, 1)
    result = run_federation(model, {"a": folder / "a.jsonl"}, chosen, folder / "run")
    return result, result.client_state("a")


def test_kept_releases_are_those_that_left_with_the_truth_beside_them(model: Path, tmp_path: Path) -> None:
    _, state = run(model, tmp_path, settings(gradients="noised"))
    kept = load_observed(state, tmp_path / "a.jsonl", model, state / "key")
    assert len(kept.observed) == 5
    bottom = load_segment(CheckpointFolder(model), Piece(0, 1, embedding=True))
    for record in kept.observed:
        assert len(record.activations) == 1  # once, whatever the number of epochs
        with torch.no_grad():
            clean = bottom(bottom.embed(record.token_ids[None]))[0]
        real = slice(0, record.length)
        assert torch.allclose(record.activations[0][real], clean[real], atol=1e-5)
        assert len(record.gradients) == len(record.hidden) >= 1
    assert kept.gradient_mechanism is not None
    assert len(kept.updates) == 1


def test_command_attacks_and_its_finding_stands_in_the_state_folder(model: Path, tmp_path: Path) -> None:
    _, state = run(model, tmp_path, settings())
    write_notes(tmp_path / "public.jsonl", "general", 40, 3)
    arguments = ["--state", state, "--model", model, "--data", tmp_path / "a.jsonl", "--key", state / "key"]
    arguments += ["--public", tmp_path / "public.jsonl", "--seconds", 5, "--json"]
    done = typer.testing.CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["worst"]["recovery"]["value"] > 0.9  # hardly any noise
    found = json.loads((state / "audit.json").read_text())
    assert found["recovery"] == report["worst"]["recovery"]["value"]


def test_audit_without_key_or_without_privacy_says_so(model: Path, tmp_path: Path) -> None:
    _, state = run(model, tmp_path, settings())
    with pytest.raises(PrivacyError, match="key"):
        load_observed(state, tmp_path / "a.jsonl", model, tmp_path / "no-key")
    with pytest.raises(ConfigError, match="kept no releases"):
        load_observed(tmp_path / "nowhere", tmp_path / "a.jsonl", model, None)
