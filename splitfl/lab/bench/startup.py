"""``splitfl bench startup``: how long a person waits for ``--help``, and a client for its first step."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import SplitFLError
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.split.create import create_checkpoint

RUNS, HELPS = 2, 5
HELP_BAR_S, JOIN_BAR_S = 0.4, 10.0

SETTINGS = """
[rounds]
count = 1
local_steps = 2
[batch]
records = 8
max_length = 128
[evaluation]
records = 0
"""


def run(*, say: Callable[[str], None] = lambda _: None) -> Result:
    """Both waits; the join is measured against importing torch alone, in turn."""
    result = Result("startup", {"runs": RUNS, "helps": HELPS, "model": "llama, 8 blocks, hidden 256, vocabulary 2048"})
    helps = [seconds_of([sys.executable, "-m", "splitfl.cli", "--help"]) for _ in range(1 + HELPS)][1:]
    result.rows.append({"what": "splitfl --help", "seconds": spread(helps)})
    say(f"splitfl --help: {spread(helps)['median']:.2f} s")
    with tempfile.TemporaryDirectory() as work:
        joins, imports = joins_and_imports(Path(work))
    result.rows += [
        {"what": "join to first step", "seconds": spread(joins)},
        {"what": "import torch", "seconds": spread(imports)},
    ]
    beyond = [join - torch for join, torch in zip(joins, imports, strict=True)]
    say(f"join to first step: {spread(beyond)['median']:.1f} s beyond torch's import")
    result.bars = [
        Bar("splitfl --help, seconds", spread(helps)["median"], HELP_BAR_S, "lower"),
        Bar("join to first step beyond torch's import, seconds", spread(beyond)["median"], JOIN_BAR_S, "lower"),
    ]
    return result


def seconds_of(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def joins_and_imports(work: Path) -> tuple[list[float], list[float]]:
    """Seconds from starting ``join`` to its first step, and of importing torch, in turn."""
    model, data = work / "model", work / "notes.jsonl"
    texts = generate_notes("general", 400, 0)
    create_checkpoint(model, family="llama", layers=8, hidden=256, vocab=2048, corpus=texts, seed=0)
    write_notes(data, "cardiology", 2000, 0)
    joins, imports = [], []
    for number in range(RUNS):
        imports.append(seconds_of([sys.executable, "-c", "import torch"]))
        with served(model, SETTINGS) as (url, agreement):
            joins.append(first_step(url, agreement, data, work / f"client-{number}", work / f"cache-{number}"))
    return joins, imports


def first_step(url: str, agreement: str, data: Path, state: Path, cache: Path) -> float:
    """Seconds until a client with an empty cache reports its first step."""
    command = [sys.executable, "-m", "splitfl.cli", "join", url, "--name", "bench", "--data", str(data)]
    command += ["--state", str(state), "--cache", str(cache), "--accept", agreement, "--key", f"{state}.key", "--json"]
    command += ["--plan", "federation"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = next((True for line in process.stdout if json.loads(line).get("event") == "step"), False)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not found:
        raise SplitFLError("the client made no step", "Run `splitfl join` by hand to see why.")
    return seconds
