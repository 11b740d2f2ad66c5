"""What an installation rests on: pins for everything, the Makefile's targets, and who may import whom."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = (ROOT / "constraints.txt").read_text().splitlines()


def canonical(requirement: str) -> str:
    """The name in a requirement, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~\[; ]", requirement)[0]).lower()


@pytest.mark.parametrize("group", ["base", "dev", "parquet"])
def test_constraints_pin_every_dependency(group: str) -> None:
    wanted = PROJECT["dependencies"] if group == "base" else PROJECT["optional-dependencies"][group]
    assert {canonical(requirement) for requirement in wanted} <= {canonical(pin) for pin in PINS}


def test_constraints_are_exact_and_fit_every_build() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in PINS)  # no +cpu, no path of this machine


def test_makefile_lists_its_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    assert names >= {"demo", "test", "check", "bench", "test-slow", "clean", "install", "docs"}


def test_make_explains_a_missing_python(tmp_path: Path) -> None:
    arguments = ["make", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python", "install"]
    tried = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert tried.returncode != 0
    assert "no Python 3.11 or newer" in tried.stderr
    assert not (tmp_path / "venv").exists()


def test_imports_go_one_way() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
