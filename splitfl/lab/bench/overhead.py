"""``splitfl bench overhead``: a split step against a whole-model step, same model, same batch, same cores.

The trunk service runs in a process of its own, behind a real websocket on loopback; the client and the whole model
run here, in turn, step by step. The whole model is trained as anyone would: transformers, fused AdamW.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound

HIDDEN, LAYERS, VOCAB, RECORDS, LENGTH = 512, 10, 2048, 8, 128
WARMUP = 2
BAR = 1.0

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


def run(*, steps: int = 20, say: Callable[[str], None] = lambda _: None) -> Result:
    """Measure for the codecs fp32 and bf16. ``steps`` interleaved pairs each."""
    config = {"hidden": HIDDEN, "layers": LAYERS, "vocab": VOCAB, "batch": [RECORDS, LENGTH], "cut": [1, 1]}
    result = Result("overhead", {**config, "optimizer": "adamw (fused), all parts trained, fp32", "steps": steps})
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
            say(f"codec {codec}: split / whole = {row['ratio']['median']:.3f}")  # type: ignore[index]
            result.rows.append(row)
            result.bars.append(Bar(f"step time ratio, {codec}", row["ratio"]["median"], BAR, "lower"))  # type: ignore[index]
    return result


def measure(model: Path, codec: str, steps: int) -> dict[str, object]:
    """Interleaved pairs (whole step, split step) on one model and codec."""
    text = SETTINGS.format(records=RECORDS, length=LENGTH, codec=codec)
    settings = parse_settings(text)
    batch = random_batch()
    whole = WholeStep(model)
    with served(model, text) as (url, _):
        split = SplitStep(model, settings, url)
        try:
            pairs = [(whole(batch), split(batch)) for _ in range(WARMUP + steps)][WARMUP:]
        finally:
            split.close()
    seconds_whole, seconds_split = ([pair[side][0] for pair in pairs] for side in (0, 1))
    differences = [abs(whole_loss - split_loss) for (_, whole_loss), (_, split_loss) in pairs]
    return {
        "codec": codec,
        "whole_s": spread(seconds_whole),
        "split_s": spread(seconds_split),
        "ratio": spread([b / a for a, b in zip(seconds_whole, seconds_split, strict=True)]),
        "ratio_of_medians": statistics.median(seconds_split) / statistics.median(seconds_whole),
        "largest_loss_difference": max(differences),
    }


def parse_settings(text: str) -> Federation:
    import tomllib

    return parse_federation(tomllib.loads(text), "the benchmark")


def random_batch() -> Batch:
    """Random tokens, every position labelled but the last."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (RECORDS, LENGTH))
    labels = np.concatenate([ids[:, 1:], np.full((RECORDS, 1), -100)], axis=1)
    return Batch(ids, labels, np.full(RECORDS, LENGTH))


class WholeStep:
    """One ordinary training step; returns seconds and loss."""

    def __init__(self, folder: Path) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        began = time.perf_counter()
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        logits = self.model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, float(loss.detach())


class SplitStep:
    """One split step through the service at ``url``; returns seconds and mean loss."""

    def __init__(self, folder: Path, settings: Federation, url: str) -> None:
        self.link = Link(url, Hello(PROTOCOL_VERSIONS, "bench"), say=lambda _: None)
        self.link.open()
        ends = Ends(CheckpointFolder(folder), settings, Cut(1, 1), torch.device("cpu"))
        self.trainer = Trainer(ends, self.link, Gate(settings.wire.codec))
        self.link.ask(NextRound(0, 0, -1))
        self.step = 0

    def __call__(self, batch: Batch) -> tuple[float, float]:
        began = time.perf_counter()
        loss = self.trainer.step(0, self.step, [batch])
        self.step += 1
        return time.perf_counter() - began, loss.total / loss.tokens

    def close(self) -> None:
        self.link.close()
