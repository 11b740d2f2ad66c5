"""``splitfl bench overhead``: a split step against a whole-model step, same model, same batch, same cores.

The trunk service runs in a process of its own, behind a real websocket on loopback, and the client runs here, as
``join`` would. The whole model is trained as anyone would, by transformers and torch, in processes of their own: with
``torch.optim.AdamW(parameters)`` as it comes (the bar), and with its fused variant, which is what both sides of the
split use. It trains what the split trains: with a frozen bottom its embedding and first block are frozen too, and with
bf16 arithmetic it runs under the same autocast. All take their steps in turn.

A sample is a burst of steps: the trunk's own step ends behind the reply or begins with the next request, and one that
ran into the next contender's time would flatter the split.

And where the time goes: what the parts of a step take when they are computed alone (``parts.py``).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client_model.ends import Ends
from client_model.link import Link
from client_model.trainer import Trainer
from splitfl.allocator import keep_freed_memory, share_one_heap
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes
from splitfl.data.packing import Batch
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.lab.bench.parts import Parts
from splitfl.lab.bench.whole import WholeProcess, full_batch
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.noise import NoiseStream
from splitfl.privacy.policy import policy_of, workload
from splitfl.privacy.vault import Vault
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound

BURST = 4  # steps of one contender at a time
WARM_UP = 3  # steps of each before anything counts: so many take to have all memory at hand
BAR, PRIVACY_BAR = 0.95, 1.05
BASELINES = ("plain", "fused")

Steps = Callable[[Sequence[Batch]], list[tuple[float, float]]]  # a step for each batch -> seconds and loss of each

SETTINGS = """
[rounds]
local_steps = 100000
[batch]
records = {records}
max_length = {length}
[model]
n_bottom = 1
n_top = 1
freeze_below = {frozen}
compute = "{compute}"
[optimizer]
schedule = "constant"
learning_rate = 1e-4
max_grad_norm = 0
[wire]
codec = "{codec}"
"""
PRIVATE = """
[privacy]
mode = "measured"
clip_norm = 20.0
gradients = "noised"
"""


@dataclass(frozen=True)
class Size:
    """What is measured: a llama, and a step's batch of ``records`` x ``length`` tokens."""

    hidden: int = 512
    layers: int = 10
    vocab: int = 2048
    records: int = 8
    length: int = 128


@dataclass(frozen=True)
class Mode:
    """One way of splitting, and the bar on its step against the whole model's, if it has one."""

    name: str
    codec: str
    compute: str = "fp32"
    frozen: int = 0  # blocks below this number, and the embedding
    private: bool = False
    bar: float | None = None

    def settings(self, size: Size) -> str:
        """As federation.toml has it."""
        text = SETTINGS.format(
            records=size.records, length=size.length, frozen=self.frozen, compute=self.compute, codec=self.codec
        )
        return text + PRIVATE * self.private


MODES = (
    Mode("fp32 on the wire", "fp32", bar=BAR),
    Mode("bf16 on the wire", "bf16", bar=BAR),
    Mode("bf16 on the wire and in arithmetic", "bf16", compute="bf16", bar=BAR),
    Mode("default: bottom frozen, bf16 on the wire", "bf16", frozen=1),
    Mode("privacy measured, int8 on the wire", "int8", frozen=1, private=True, bar=PRIVACY_BAR),
)


def run(*, steps: int = 12, size: Size = Size(), say: Callable[[str], None] = lambda _: None) -> Result:
    """Measure every mode; ``steps`` timed steps of each contender, in interleaved bursts."""
    keep_freed_memory()  # as join does both
    share_one_heap()
    result = Result("overhead", {**asdict(size), "cut": [1, 1], "optimizer": "adamw", "steps": steps, "burst": BURST})
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        create_checkpoint(
            model,
            family="llama",
            layers=size.layers,
            hidden=size.hidden,
            vocab=size.vocab,
            corpus=generate_notes("general", 400, 0),
            seed=0,
        )
        for mode in MODES:
            row = measure(model, mode, size, max(1, steps // BURST))
            plain, fused = (row[f"ratio_to_{name}"]["median"] for name in BASELINES)
            say(f"{mode.name}: split / whole = {plain:.3f} (whole with fused AdamW: {fused:.3f})")
            result.rows.append(row)
            if mode is MODES[0]:  # at once, for machines differ from minute to minute
                alone = measure_parts(model, mode, size, steps)
                say(f"its parts, computed alone: {alone['parts_s']['median']:.3f} s")
                result.rows.append(alone)
            if mode.bar is not None:
                result.bars.append(Bar(f"step time ratio, {mode.name}", plain, mode.bar, "lower"))
    return result


def measure(model: Path, mode: Mode, size: Size, repeats: int) -> dict[str, Any]:
    """Interleaved bursts of steps (whole with either AdamW, split) on one model, after one that warms up."""
    settings = parse_settings(mode.settings(size))
    batch = random_batch(size.records, size.length, size.vocab)
    steps = [new_records(batch, step, settings) for step in range(WARM_UP + BURST * repeats)]
    bursts = [steps[:WARM_UP], *(steps[at : at + BURST] for at in range(WARM_UP, len(steps), BURST))]
    with ExitStack() as stack:
        runners: dict[str, Steps] = {}
        for name, fused in zip(BASELINES, (None, True), strict=True):
            runners[name] = whole = WholeProcess(model, fused=fused, frozen=mode.frozen, bf16=mode.compute == "bf16")
            stack.callback(whole.close)
        url, _ = stack.enter_context(served(model, mode.settings(size)))
        split = SplitStep(model, settings, url, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(split.close)
        runners["split"] = lambda batches: [split(batch) for batch in batches]
        taken = [{name: burst(run(batches)) for name, run in runners.items()} for batches in bursts][1:]
        rows = split.trainer.gate.ledger.count
    seconds = {name: [sample[name][0] for sample in taken] for name in runners}
    ratios = {name: [b / a for a, b in zip(seconds[name], seconds["split"], strict=True)] for name in BASELINES}
    return {
        "mode": mode.name,
        **{f"{name}_s": spread(values) for name, values in seconds.items()},
        **{f"ratio_to_{name}": spread(values) for name, values in ratios.items()},
        "largest_loss_difference": max(abs(sample["split"][1] - sample["fused"][1]) for sample in taken),
        "ledger_rows": rows,
    }


def measure_parts(model: Path, mode: Mode, size: Size, steps: int) -> dict[str, Any]:
    """Seconds of a step's parts, computed alone in this process, and of all together."""
    parts = Parts(model, parse_settings(mode.settings(size)))
    batch = random_batch(size.records, size.length, size.vocab)
    for _ in range(WARM_UP + steps):
        parts(batch)
    taken = {name: seconds[WARM_UP:] for name, seconds in parts.seconds.items()}
    together = [sum(step) for step in zip(*taken.values(), strict=True)]
    each = {f"{name}_s": spread(seconds) for name, seconds in taken.items()}
    return {"parts": f"{mode.name}, alone", **each, "parts_s": spread(together)}


def burst(taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds and losses of steps -> mean seconds, and the last one's loss."""
    return sum(seconds for seconds, _ in taken) / len(taken), taken[-1][1]


def new_records(batch: Batch, step: int, settings: Federation) -> Batch:
    """The batch as the trunk has not seen it, where it would be known by name: the step is one of a first epoch."""
    if settings.privacy.on:
        keys = tuple(step.to_bytes(8, "big") + row.to_bytes(8, "big") for row in range(len(batch.input_ids)))
        return replace(batch, keys=keys, padded_lengths=(batch.input_ids.shape[1],) * len(keys))
    if settings.freeze_below == 0:
        return batch
    return replace(batch, input_ids=np.random.default_rng(step).permutation(batch.input_ids, axis=1))


def parse_settings(text: str) -> Federation:
    import tomllib

    return parse_federation(tomllib.loads(text), "the benchmark")


def random_batch(records: int, length: int, vocab: int, seed: int = 0) -> Batch:
    """Random tokens, every position labelled but the last."""
    ids = np.random.default_rng(seed).integers(0, vocab, (records, length))
    labels = np.concatenate([ids[:, 1:], np.full((records, 1), -100)], axis=1)
    return full_batch(ids, labels)


def plain_gate(settings: Federation, state: Path) -> Gate:
    """The gate of a client in ``state``, as join opens it."""
    key = bytes(32)
    policy = policy_of(settings, workload(settings, settings.batch.records, 0))
    ledger, vault = Ledger(state / "ledger.sqlite"), Vault(state / "releases.sqlite", key)
    return Gate(policy, settings.wire.codec, ledger, vault, NoiseStream(), secret=key)


class SplitStep:
    """One split step through the service at ``url``; returns seconds and mean loss."""

    def __init__(self, folder: Path, settings: Federation, url: str, state: Path, name: str = "bench") -> None:
        self.link = Link(url, Hello(PROTOCOL_VERSIONS, name), say=lambda _: None)
        self.link.open()
        ends = Ends(CheckpointFolder(folder), settings, Cut(1, 1), torch.device("cpu"))
        self.trainer = Trainer(ends, self.link, plain_gate(settings, state))
        self.link.ask(NextRound(0, 0, -1))
        self.step = 0

    def __call__(self, batch: Batch) -> tuple[float, float]:
        began = time.perf_counter()
        loss = self.trainer.step(0, self.step, [batch])
        self.step += 1
        return time.perf_counter() - began, loss.total / loss.tokens

    def close(self) -> None:
        self.link.close()
