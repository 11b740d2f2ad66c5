"""The whole model's training step that benchmarks compare with, in a process of its own.

It is what anyone would write with transformers and torch, in the environment that Python has when nobody arranges it:
threads wait as libgomp has them wait, and no other computation shares its memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from splitfl.data.packing import Batch
from splitfl.data.records import IntArray
from splitfl.errors import SplitFLError
from splitfl.spinning import brief_spins


class WholeStep:
    """One ordinary training step; returns seconds and loss. ``fused`` as torch's AdamW has it (None: its default).

    Embedding and blocks below ``frozen`` do not train; ``bf16``: forward and loss under autocast.
    """

    def __init__(self, folder: Path, *, fused: bool | None, frozen: int = 0, bf16: bool = False) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.bf16 = bf16
        if frozen:
            below = ("model.embed_tokens.", *(f"model.layers.{number}." for number in range(frozen)))
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(not name.startswith(below))
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=fused)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        began = time.perf_counter()
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, float(loss.detach())


class WholeProcess:
    """:class:`WholeStep` in a process of its own, which :meth:`close` ends; it loads while this one goes on."""

    def __init__(self, folder: Path, *, fused: bool | None, frozen: int = 0, bf16: bool = False) -> None:
        options = json.dumps({"fused": fused, "frozen": frozen, "bf16": bf16})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "splitfl.lab.bench.whole", str(folder), options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ordinary_environment(),
            text=True,
        )

    def __call__(self, batches: Sequence[Batch]) -> list[tuple[float, float]]:
        """A step for each batch, none padded: seconds and loss of each. Raises SplitFLError when the process ended."""
        asked, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        try:
            print(json.dumps([[b.input_ids.tolist(), b.labels.tolist()] for b in batches]), file=asked, flush=True)
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SplitFLError("the whole model's process has ended", "Its own words stand above.")
        return [(seconds, loss) for seconds, loss in json.loads(answer)]

    def close(self) -> None:
        """End the process and wait until it has ended."""
        self._process.communicate()


def ordinary_environment() -> dict[str, str]:
    """This process's environment, less what a command of ours adds to it."""
    ours = brief_spins({})
    return {name: value for name, value in os.environ.items() if ours.get(name) != value}


def main() -> None:
    """Take steps on the batches that come on stdin, a burst a line, until it ends."""
    transformers.utils.logging.disable_progress_bar()
    folder, options = sys.argv[1:]
    step = WholeStep(Path(folder), **json.loads(options))
    for line in sys.stdin:
        batches = [full_batch(np.array(ids), np.array(labels)) for ids, labels in json.loads(line)]
        print(json.dumps([step(batch) for batch in batches]), flush=True)


def full_batch(ids: IntArray, labels: IntArray) -> Batch:
    """Rows (B, T) of which none is padded."""
    return Batch(ids, labels, np.full(len(ids), ids.shape[1]))


if __name__ == "__main__":
    main()
