"""What every benchmark shares: the machine, medians with spread, bars, rows that outlast an interruption, and one JSON
object in one shape.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch

from client_model.probe import processor
from splitfl.errors import ConfigError, SplitFLError
from splitfl.files import write_file

T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """A figure and what it should be. ``better`` says on which side of ``bar`` it holds."""

    name: str
    value: float
    bar: float
    better: Literal["lower", "higher"]

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar


@dataclass
class Result:
    """One benchmark's outcome; ``drawn`` is what its picture shows and its table does not."""

    bench: str
    config: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    drawn: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        bars = [{**asdict(bar), "holds": bar.holds} for bar in self.bars]
        found = {"bench": self.bench, "config": self.config, "machine": machine(), "rows": self.rows, "bars": bars}
        return {**found, "drawn": self.drawn} if self.drawn else found


def machine() -> dict[str, Any]:
    """What this ran on."""
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def in_parallel(tasks: Sequence[Callable[[], T]], jobs: int) -> list[T]:
    """What all tasks give, in their order; ``jobs`` at once, in processes of their own that share the cores evenly."""
    if jobs == 1:
        return [task() for task in tasks]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


@contextmanager
def workplace(work: Path | None, config: dict[str, Any]) -> Iterator[Path]:
    """The folder ``work``, where a run goes on that was interrupted; without one, a folder that is forgotten.

    Raises ConfigError when ``work`` holds a run with another ``config``.
    """
    with nullcontext(work) if work is not None else tempfile.TemporaryDirectory() as kept:
        claim(Path(kept), config)
        yield Path(kept)


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Make ``folder`` this run's. Raises ConfigError when it is another's."""
    path, text = folder / "config.json", json.dumps(config, indent=2, sort_keys=True, default=str)
    if path.exists() and path.read_text() != text:
        raise ConfigError(f"{folder} holds another run", "Name a new --work, or repeat that run's options.")
    write_file(path, text.encode())


def once(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row as it was measured, now or earlier."""
    path = folder / "rows" / f"{name}.json"
    if not path.exists():
        write_file(path, json.dumps(measure()).encode())
    row: dict[str, Any] = json.loads(path.read_text())
    return row


@contextmanager
def served(model: Path, federation: str, *, threads: int = 0) -> Iterator[tuple[str, str]]:
    """A trunk service in a process of its own; gives its address and its agreement's hash. Raises SplitFLError."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "federation.toml").write_text(federation)
        command = [sys.executable, "-m", "splitfl.cli", "serve", str(model), "--state", f"{work}/state"]
        command += ["--listen", "127.0.0.1:0", "--federation", f"{work}/federation.toml", "--json"]
        command += ["--threads", str(threads)]
        log = Path(work) / "log"
        with log.open("w") as messages:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SplitFLError("the trunk service did not start", log.read_text()[-300:])
            listening = json.loads(line)
            threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()  # a full pipe would stop it
            yield listening["url"], listening["agreement"]
        finally:
            process.kill()  # all that it keeps goes with its folder
            process.wait()
