"""Puts this folder on the path, so that every test can import ``helpers``, package or not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
