"""Puts this folder on the path, so that every test can import ``helpers``, package or not.

One thread for each torch operation: the models here are so small that more only wait for one another, and on a
shared machine they wait long. It has to be said before torch is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
