"""``splitfl --help`` and a mistyped command answer at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("cryptography", "matplotlib", "numpy", "opacus", "scipy", "torch", "transformers", "websockets")


def test_commands_are_known_without_heavy_imports() -> None:
    program = f"import sys, splitfl.cli; print(*(name for name in {HEAVY} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ended.stdout.split() == []
