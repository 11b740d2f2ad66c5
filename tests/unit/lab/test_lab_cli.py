"""``splitfl init`` and ``splitfl eval``: a bad row stops them, unless it is to be left out."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from splitfl.cli import app
from splitfl.errors import DataError

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
