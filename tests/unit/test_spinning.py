"""Torch's threads spin briefly in every command, unless somebody has said how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAYS = "import os, splitfl.cli; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ({}, "50000 None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
    ],
)
def test_commands_say_how_threads_wait_unless_the_environment_does(said: dict[str, str], then: str) -> None:
    mine = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    ended = subprocess.run([sys.executable, "-c", SAYS], env=mine | said, check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == then
