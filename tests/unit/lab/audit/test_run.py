"""The whole audit: all attacks in order of recovery, beside baselines, none weaker than a simpler one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from splitfl.cut import Cut
from splitfl.errors import ConfigError, DataError
from splitfl.lab.audit.cli import audit
from splitfl.lab.audit.enumeration import Search
from splitfl.lab.audit.kept import Kept
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import Observed
from splitfl.lab.audit.report import AuditReport, Row
from splitfl.lab.audit.run import JOINT, LABELS, MLP, NEAREST, SEARCH, TRANSFORMER, Plan, run_audit
from splitfl.lab.audit.scores import Interval

from .bench import Bench, generator

QUICK = Plan(steps=20, search=Search(width=2, widest=2))
NOISY = Mechanism("token", 0.1, sigma=0.025)


def audited(bench: Bench, mechanism: Mechanism, gradients: Mechanism | None, cut: Cut) -> AuditReport:
    model = bench.model(cut)
    return run_audit(
        bench.observed(model, mechanism, gradients=gradients),
        model,
        mechanism,
        bench.text.public,
        generator=generator(),
        gradient_mechanism=gradients,
        plan=QUICK,
    )


def test_an_audit_sorts_attacks_and_takes_activations_with_gradients(bench: Bench) -> None:
    report = audited(bench, NOISY, Mechanism("record", 0.05), Cut(1, 0))
    found = {row.name: row.recovery.value for row in report.attacks}
    assert set(found) == {NEAREST, MLP, TRANSFORMER, LABELS, JOINT, SEARCH}
    assert sorted(found.values(), reverse=True) == [row.recovery.value for row in report.attacks]
    assert report.outdone == []
    assert found[JOINT] > found[TRANSFORMER] + 0.05
    assert found[LABELS] > 0.9
    assert report.worst.recovery.value >= 0.97
    assert report.worst.recovery.value > max(row.recovery.value for row in report.baselines)


def test_without_noise_everything_is_read_at_a_frozen_bottom(bench: Bench) -> None:
    report = audited(bench, Mechanism("token", 0.1), None, Cut(1, 1))
    assert report.worst.recovery == Interval(1.0, 1.0, 1.0)
    assert report.outdone == []


def test_an_audit_comes_again_with_its_seed(bench: Bench) -> None:
    first, second = (audited(bench, NOISY, None, Cut(0, 0)) for _ in range(2))
    assert [row.recovery for row in first.attacks] == [row.recovery for row in second.attacks]


def test_a_weaker_attack_is_marked_and_the_maximum_stands() -> None:
    strong, weak = Interval(0.6, 0.5, 0.7), Interval(0.3, 0.2, 0.4)
    rows = (Row("simple", strong, strong, 1.0), Row("trained", weak, weak, 9.0, simpler=("simple",)))
    report = AuditReport(3, 99, rows, ())
    assert report.outdone == ["trained"]
    assert report.statement.startswith("No guarantee. Our attacks recovered 60.0% [50.0%, 70.0%] of tokens")
    assert "weaker than a simpler one" in "\n".join(report.lines())


def test_an_audit_refuses_to_attack_nothing_or_to_learn_from_nothing(bench: Bench) -> None:
    model = bench.model(Cut(0, 0))
    with pytest.raises(DataError, match="nothing to attack"):
        run_audit([], model, NOISY, bench.text.public, generator=generator())
    with pytest.raises(DataError, match="too few"):
        run_audit(bench.observed(model, NOISY), model, NOISY, bench.text.public[:3], generator=generator())


def test_a_kept_record_that_does_not_fit_is_refused() -> None:
    ids = torch.zeros(4, dtype=torch.long)
    with pytest.raises(DataError, match="real"):
        Observed(ids, 5, (torch.zeros(4, 8),))
    with pytest.raises(DataError, match="fit"):
        Observed(ids, 4, (torch.zeros(3, 8),))
    with pytest.raises(DataError, match="hidden"):
        Observed(ids, 4, (torch.zeros(4, 8),), gradients=(torch.zeros(4, 8),))


@pytest.fixture
def app() -> Typer:
    found = Typer()
    found.command()(audit)
    return found


def test_the_command_attacks_a_state_folder(
    app: Typer, tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfl.lab.audit.command.load_observed", lambda *_: kept_of(small_model))
    (tmp_path / "canaries.txt").write_text("my code is 1234\n")
    arguments = [
        "--state",
        str(tmp_path),
        "--data",
        str(tmp_path),
        "--model",
        str(small_model),
        "--seconds",
        "1",
        "--json",
    ]
    arguments += ["--out", str(tmp_path / "picture.png"), "--exported", str(small_model)]
    result = CliRunner().invoke(app, [*arguments, "--canaries", str(tmp_path / "canaries.txt")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["worst"]["recovery"]["value"] >= 0.99
    assert 0 <= found["canaries"]["my code is 1234"] <= 10
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def kept_of(folder: Path) -> Kept:
    """Two records of a client that sent embeddings without noise."""
    from splitfl.lab.audit.model import PublicModel
    from splitfl.split.checkpoint import CheckpointFolder

    cut, mechanism = Cut(0, 0), Mechanism("token", 1.0)
    model = PublicModel(CheckpointFolder(folder), cut)
    ids = torch.randint(2, 300, (2, 16), generator=generator())
    sent = mechanism.apply(model.hidden(ids), generator())
    observed = tuple(Observed(row, 16, (release,)) for row, release in zip(ids, sent, strict=True))
    return Kept(observed, cut, mechanism, None, 16)


def test_the_command_says_when_a_run_kept_nothing(app: Typer, tmp_path: Path, small_model: Path) -> None:
    result = CliRunner().invoke(app, ["--state", str(tmp_path), "--data", str(tmp_path), "--model", str(small_model)])
    assert result.exit_code == ConfigError.exit_code
    assert "kept no releases" in result.stderr


def test_the_command_wants_canaries_and_a_model_together(app: Typer, tmp_path: Path, small_model: Path) -> None:
    arguments = [
        "--state",
        str(tmp_path),
        "--data",
        str(tmp_path),
        "--model",
        str(small_model),
        "--canaries",
        str(tmp_path / "x"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == ConfigError.exit_code
    assert "go together" in result.stderr
