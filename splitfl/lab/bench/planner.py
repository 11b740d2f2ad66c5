"""``splitfl bench planner``: what the planner predicts of a client against what the kernel and the clock say.

For each of two models and several cuts a real ``splitfl join`` runs against a trunk on loopback, under a real limit
(splitfl/lab/bench/limits.py) just above the prediction: a client that needs more cannot have it.

Here the trunk runs on the same machine with as many threads as the client, so that what the planner does not know at
home is known: the trunk's seconds a token are the probe's own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitfl.config import parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import SplitFLError
from splitfl.lab.bench.harness import Bar, Result, served
from splitfl.lab.bench.limits import MemoryLimit, memory_limit
from splitfl.lab.peaks import PeakWatch
from splitfl.planning.capability import Arithmetic, LinkSpeed
from splitfl.planning.carried import Carried
from splitfl.planning.plan import Plan
from splitfl.planning.shapes import ModelShape
from splitfl.planning.timing import step_seconds, time_parts
from splitfl.split.checkpoint import read_config
from splitfl.split.create import create_checkpoint

PEAK_WITHIN, STEP_WITHIN = 0.15, 0.25
SLACK = 1.1  # times the prediction that a client is given
STEPS, SURVIVED, WARMUP = 5, 50, 2
LOOPBACK = "20000,20000,0.5"  # Mbit/s and ms: what `splitfl probe` measures here, rounded


@dataclass(frozen=True)
class Shape:
    """A model to measure on, as `splitfl init` makes it."""

    family: str
    layers: int
    hidden: int
    vocab: int


SHAPES = (Shape("llama", 8, 256, 4096), Shape("qwen2", 6, 512, 2048))
CUTS = ("0,0", "0,2", "1,1", "2,2", "1,4", "3,3")

SETTINGS = """
[rounds]
count = 1
local_steps = {steps}
[batch]
records = 8
micro_batches = 2
max_length = 128
[model]
min_bottom = 0
max_bottom = 3
min_top = 0
max_top = {layers}
freeze_below = 0
compute = "fp32"
[optimizer]
schedule = "constant"
[evaluation]
records = 8
baselines = "none"
"""


def run(*, say: Callable[[str], None] = lambda _: None) -> Result:
    """Every cut of both models."""
    shapes = [asdict(shape) for shape in SHAPES]
    result = Result("planner", {"shapes": shapes, "cuts": CUTS, "slack": SLACK, "steps": STEPS})
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as work:
            bench = Bench(Path(work), shape)
            for cut in CUTS:
                lasting = (shape, cut) == (SHAPES[0], CUTS[-1])
                row = bench.measure(cut, SURVIVED if lasting else STEPS)
                ratios = f"peak {row['peak_ratio']:.2f}, step {row['step_ratio']:.2f}"
                say(f"{shape.family} {cut}, measured / predicted: {ratios}")
                result.rows.append(row)
    result.bars = bars(result.rows)
    return result


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """How far off the worst prediction is, and whether clients lived under their limits."""
    peak, step = (max(abs(row[ratio] - 1) for row in rows) for ratio in ("peak_ratio", "step_ratio"))
    lived = [row["steps"] for row in rows if row["survived"]]
    return [
        Bar("peak memory, furthest from its prediction", peak, PEAK_WITHIN, "lower"),
        Bar("step time, furthest from its prediction", step, STEP_WITHIN, "lower"),
        Bar("share of clients that lived under their limit", len(lived) / len(rows), 1.0, "higher"),
        Bar("most steps of one that lived", max(lived, default=0), SURVIVED, "higher"),
    ]


class Bench:
    """One model in ``work``, its client's data, and what is predicted for it."""

    def __init__(self, work: Path, shape: Shape) -> None:
        self.work, self.shape = work, shape
        self.model, self.data = work / "model", work / "notes.jsonl"
        texts = generate_notes("general", 400, 0)
        create_checkpoint(self.model, **asdict(shape), corpus=texts, seed=0)
        write_notes(self.data, "cardiology", 400, 0)
        self.predicted = self._predict()

    def settings(self, steps: int) -> str:
        return SETTINGS.format(steps=steps, layers=self.shape.layers)

    def _predict(self) -> dict[str, Any]:
        """What ``splitfl probe`` says, in a process as small as a client's."""
        federation = self.work / "federation.toml"
        federation.write_text(self.settings(STEPS))
        command = splitfl("probe", "--model", self.model, "--federation", federation, "--link", LOOPBACK)
        command += ["--cache", str(self.work / "cache"), "--threads", "1", "--json"]
        told: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return told

    def prediction(self, cut: str) -> dict[str, Any]:
        """The candidate that a client with this cut and the federation's own everything is."""
        own = {**asdict(plan_of(cut)), "cut": cut}
        return next(one for one in self.predicted["candidates"] if one["plan"] == own)

    def step_with_trunk(self, plan: Plan) -> float:
        """Predicted seconds of a step with a trunk as fast as the client."""
        pace, link = self.predicted["machine"]["compute"][plan.dtype], self.predicted["machine"]["link"]
        own = Arithmetic(*(pace[part]["median"] for part in ("block", "frozen_block", "head")))
        speed = LinkSpeed(*(link[way]["median"] for way in ("rtt", "up", "down")))
        settings = parse_federation(tomllib.loads(self.settings(STEPS)), "the benchmark")
        carried = Carried(ModelShape.of(read_config(self.model)), settings, plan.cut)
        parts = time_parts(carried, plan, own, own, speed)
        return step_seconds(parts, plan, backward=carried.needs_backward)

    def measure(self, cut: str, steps: int) -> dict[str, Any]:
        """Run a client under a limit just above its prediction."""
        candidate, machine = self.prediction(cut), self.predicted["machine"]
        most = int(SLACK * candidate["peak_bytes"])
        limit = memory_limit(most, most - machine["base"] + machine["base_data"])
        with limit as under, served(self.model, self.settings(steps), threads=1) as (url, agreement):
            folder = self.work / f"client-{cut}"
            command = splitfl("join", url, "--name", "bench", "--data", self.data, "--state", folder, "--plan", cut)
            command += ["--cache", str(self.work / "cache"), "--accept", agreement, "--key", f"{folder}.key"]
            outcome = run_limited([*command, "--threads", "1", "--json"], under)
        peak, step = candidate["peak_bytes"], self.step_with_trunk(plan_of(cut))
        return {
            "model": self.shape.family,
            "cut": cut,
            "predicted_peak": peak,
            "peak": outcome.peak,
            "peak_ratio": outcome.peak / peak,
            "predicted_step_s": step,
            "step_s": outcome.step_s,
            "step_ratio": outcome.step_s / step,
            "limit": under.kind,
            "limit_bytes": most,
            "steps": outcome.steps,
            "survived": outcome.steps == steps and not outcome.shortages,
            "parts": candidate["parts"],
        }


def plan_of(cut: str) -> Plan:
    """Everything but the cut as the federation has it."""
    return Plan(Cut.parse(cut), 2, "fp32", "bf16", 2)


@dataclass(frozen=True)
class Outcome:
    """Steps that a client took, the median of their seconds, how often memory ran out, and its peak resident bytes."""

    steps: int
    step_s: float
    shortages: int
    peak: int


def splitfl(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "splitfl.cli", *map(str, arguments)]


def run_limited(command: list[str], limit: MemoryLimit) -> Outcome:
    """Run a client under ``limit``. Raises SplitFLError when it made too few steps to tell."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=limit.enter)
        watch = PeakWatch(process)
        assert process.stdout is not None
        events = [(time.perf_counter(), json.loads(line)) for line in process.stdout]
        process.wait()
        errors.seek(0)
        said = errors.read()[-400:].decode(errors="replace")
    at = [when for when, event in events if event.get("event") == "step"]
    if len(at) < WARMUP + 2:
        raise SplitFLError(f"a client under a limit ({limit.kind}) made {len(at)} steps", said)
    apart = [after - before for before, after in zip(at[WARMUP - 1 :], at[WARMUP:], strict=False)]
    steps = {event["step"] for _, event in events if event.get("event") == "step"}
    shortages = sum(event.get("event") == "memory_short" for _, event in events)
    return Outcome(len(steps), statistics.median(apart), shortages, watch.peak)
