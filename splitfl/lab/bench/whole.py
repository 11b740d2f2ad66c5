"""The whole model's training step that benchmarks compare with, in a process of its own.

It is what anyone would write with transformers and torch, in the environment that Python has when nobody arranges it:
threads wait as libgomp has them wait, and no other computation shares its memory.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from splitfl.data.packing import Batch
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
        command = [sys.executable, "-m", "splitfl.lab.bench.whole"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ordinary_environment()
        )
        self._tell((folder, {"fused": fused, "frozen": frozen, "bf16": bf16}))

    def __call__(self, batches: Sequence[Batch]) -> list[tuple[float, float]]:
        """A step for each batch: seconds and loss of each. Raises SplitFLError when the process has ended."""
        try:
            self._tell(list(batches))
            return cast(list[tuple[float, float]], pickle.load(self._process.stdout))  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError) as error:
            raise SplitFLError("the whole model's process has ended", "Its own words stand above.") from error

    def _tell(self, what: object) -> None:
        pipe = cast(BinaryIO, self._process.stdin)
        pipe.write(pickle.dumps(what))
        pipe.flush()

    def close(self) -> None:
        """End the process and wait until it has ended."""
        self._process.communicate()


def ordinary_environment() -> dict[str, str]:
    """This process's environment, less what a command of ours adds to it."""
    ours = brief_spins({})
    return {name: value for name, value in os.environ.items() if ours.get(name) != value}


def main() -> None:
    """Take steps on the batches that come on stdin, until it ends."""
    transformers.utils.logging.disable_progress_bar()
    asked, answers = cast(BufferedReader, sys.stdin.buffer), sys.stdout.buffer
    folder, options = pickle.load(asked)
    step = WholeStep(folder, **options)
    while asked.peek(1):
        answers.write(pickle.dumps([step(batch) for batch in pickle.load(asked)]))
        answers.flush()


if __name__ == "__main__":
    main()
