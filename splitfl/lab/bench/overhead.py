"""``splitfl bench overhead``: a split step against a whole-model step, same model, same batch, same cores.

The trunk service runs in a process of its own, behind a real websocket on loopback; the client and the whole model
run here, in turn, step by step. The whole model is trained as anyone would, by transformers and torch: with
``torch.optim.AdamW(parameters)`` as it comes (the bar), and with its fused variant, which is what both sides of the
split use and which leaves less to do behind the reply.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from client_model.ends import Ends
from client_model.link import Link
from client_model.trainer import Trainer
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes
from splitfl.data.packing import Batch
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.noise import NoiseStream
from splitfl.privacy.policy import policy_of, workload
from splitfl.privacy.vault import Vault
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound

HIDDEN, LAYERS, VOCAB, RECORDS, LENGTH = 512, 10, 2048, 8, 128
WARMUP = 2
BAR, PRIVACY_BAR = 1.0, 1.05
BASELINES = ("plain", "fused")

SETTINGS = """
[rounds]
local_steps = 100000
[batch]
records = {records}
max_length = {length}
[model]
n_bottom = 1
n_top = 1
freeze_below = 0
compute = "fp32"
[optimizer]
schedule = "constant"
learning_rate = 1e-4
max_grad_norm = 0
[wire]
codec = "{codec}"
"""
FROZEN = SETTINGS.replace("freeze_below = 0", "freeze_below = 1").replace("{codec}", "bf16")
PRIVATE = """
[privacy]
mode = "measured"
clip_norm = 20.0
gradients = "noised"
"""


def run(*, steps: int = 20, say: Callable[[str], None] = lambda _: None) -> Result:
    """Measure for the codecs fp32 and bf16. ``steps`` interleaved pairs each."""
    config = {"hidden": HIDDEN, "layers": LAYERS, "vocab": VOCAB, "batch": [RECORDS, LENGTH], "cut": [1, 1]}
    result = Result("overhead", {**config, "optimizer": "adamw, all parts trained, fp32", "steps": steps})
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        create_checkpoint(
            model,
            family="llama",
            layers=LAYERS,
            hidden=HIDDEN,
            vocab=VOCAB,
            corpus=generate_notes("general", 400, 0),
            seed=0,
        )
        for codec in ("fp32", "bf16"):
            row = measure(model, codec, steps)
            plain, fused = (row[f"ratio_to_{name}"]["median"] for name in BASELINES)
            say(f"codec {codec}: split / whole = {plain:.3f} (whole with fused AdamW: {fused:.3f})")
            result.rows.append(row)
            result.bars.append(Bar(f"step time ratio, {codec}", plain, BAR, "lower"))
        row = measure_privacy(model, steps)
        ratio = row["ratio_to_off"]["median"]
        say(f"clip, noise and ledger: private / off = {ratio:.3f}")
        result.rows.append(row)
        result.bars.append(Bar("step time ratio, privacy measured / off", ratio, PRIVACY_BAR, "lower"))
    return result


def measure_privacy(model: Path, steps: int) -> dict[str, Any]:
    """Interleaved split steps without privacy and with it; all records are new in each step, as in a first epoch."""
    texts = [FROZEN.format(records=RECORDS, length=LENGTH), FROZEN.format(records=RECORDS, length=LENGTH) + PRIVATE]
    with ExitStack() as stack:
        runners = []
        for text in texts:
            url, _ = stack.enter_context(served(model, text))
            state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runners.append(SplitStep(model, parse_settings(text), url, state))
            stack.callback(runners[-1].close)
        plain = random_batch()
        taken = []
        for step in range(WARMUP + steps):
            keys = tuple(bytes([step, row]) * 8 for row in range(RECORDS))
            private = replace(plain, keys=keys, padded_lengths=(LENGTH,) * RECORDS)
            taken.append((runners[0](plain)[0], runners[1](private)[0]))
        rows = runners[1].trainer.gate.ledger.count
    off, private_s = ([pair[number] for pair in taken[WARMUP:]] for number in (0, 1))
    return {
        "codec": "bf16",
        "privacy": "measured, gradients noised, every record new",
        "off_s": spread(off),
        "private_s": spread(private_s),
        "ratio_to_off": spread([b / a for a, b in zip(off, private_s, strict=True)]),
        "ledger_rows": rows,
    }


def measure(model: Path, codec: str, steps: int) -> dict[str, Any]:
    """Interleaved steps (whole with either AdamW, split) on one model and codec."""
    text = SETTINGS.format(records=RECORDS, length=LENGTH, codec=codec)
    batch = random_batch()
    with served(model, text) as (url, _), tempfile.TemporaryDirectory() as state:
        split = SplitStep(model, parse_settings(text), url, Path(state))
        runners: dict[str, Callable[[Batch], tuple[float, float]]]
        runners = {"plain": WholeStep(model, fused=None), "fused": WholeStep(model, fused=True), "split": split}
        try:
            taken = [{name: run(batch) for name, run in runners.items()} for _ in range(WARMUP + steps)][WARMUP:]
        finally:
            split.close()
    seconds = {name: [step[name][0] for step in taken] for name in runners}
    ratios = {name: [b / a for a, b in zip(seconds[name], seconds["split"], strict=True)] for name in BASELINES}
    return {
        "codec": codec,
        **{f"{name}_s": spread(values) for name, values in seconds.items()},
        **{f"ratio_to_{name}": spread(values) for name, values in ratios.items()},
        "largest_loss_difference": max(abs(step["split"][1] - step["fused"][1]) for step in taken),
    }


def parse_settings(text: str) -> Federation:
    import tomllib

    return parse_federation(tomllib.loads(text), "the benchmark")


def random_batch(records: int = RECORDS, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> Batch:
    """Random tokens, every position labelled but the last."""
    ids = np.random.default_rng(seed).integers(0, vocab, (records, length))
    labels = np.concatenate([ids[:, 1:], np.full((records, 1), -100)], axis=1)
    return Batch(ids, labels, np.full(records, length))


class WholeStep:
    """One ordinary training step; returns seconds and loss. ``fused`` as torch's AdamW has it (None: its default)."""

    def __init__(self, folder: Path, *, fused: bool | None) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=fused)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        began = time.perf_counter()
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        logits = self.model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, float(loss.detach())


def plain_gate(settings: Federation, state: Path) -> Gate:
    """The gate of a client in ``state``, as join opens it."""
    key = bytes(32)
    policy = policy_of(settings, workload(settings, RECORDS, 0))
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
