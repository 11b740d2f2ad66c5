"""``splitfl init`` and ``splitfl eval``: a bad row stops them, unless it is to be left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.errors import ConfigError, DataError
from splitfl.split.create import create_checkpoint

GOOD = "".join(json.dumps({"text": f"the cough of patient {number} is better today"}) + "\n" for number in range(20))


def test_init_and_eval_leave_out_bad_rows_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text(GOOD + "not json\n")
    make = ["init", f"{tmp_path}/base", "--corpus", f"{tmp_path}/notes.jsonl", "--layers", "3", "--hidden", "64"]
    make += ["--vocab", "300"]
    measure = ["eval", f"{tmp_path}/base", "--data", f"{tmp_path}/notes.jsonl", "--json"]
    run = CliRunner().invoke

    refused = run(app, make)
    assert refused.exit_code == DataError.exit_code
    assert "line 21" in refused.stderr
    assert "--skip-bad" in refused.stderr
    assert run(app, [*make, "--skip-bad"]).exit_code == 0

    assert run(app, measure).exit_code == DataError.exit_code
    measured = run(app, [*measure, "--skip-bad"])
    assert measured.exit_code == 0
    assert json.loads(measured.stdout)["tokens"] > 100


@pytest.mark.parametrize("command", ["eval", "serve", "simulate"])
def test_records_longer_than_the_learned_positions_are_refused_before_anything_is_written(
    command: str, tmp_path: Path
) -> None:
    notes, model, out = tmp_path / "notes.jsonl", tmp_path / "base", tmp_path / "out"
    notes.write_text(GOOD)
    create_checkpoint(
        model, family="gpt2", layers=3, hidden=64, vocab=300, corpus=GOOD.splitlines(), seed=0, max_length=64
    )
    (tmp_path / "federation.toml").write_text("[batch]\nmax_length = 65\n")
    (tmp_path / "simulation.toml").write_text(
        '[model]\nfolder = "base"\n[partition]\nclients = 2\n[federation.batch]\nmax_length = 65\n'
    )
    words = {
        "eval": [str(model), "--data", str(notes), "--federation", f"{tmp_path}/federation.toml"],
        "serve": [str(model), "--state", str(out), "--federation", f"{tmp_path}/federation.toml"],
        "simulate": [f"{tmp_path}/simulation.toml", "--out", str(out)],
    }
    ended = CliRunner().invoke(app, [command, *words[command]])
    assert ended.exit_code == ConfigError.exit_code
    assert "batch.max_length = 65, but this model has learned 64 positions" in ended.stderr
    assert "Set batch.max_length to 64 or less" in ended.stderr
    assert [path for path in out.glob("*") if path.name != ".lock"] == []
