"""What a split step computes, without the split's crossings: its parts one after another, alone in this process.

A step's time less theirs is what crossings cost, and processes that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from client_model.ends import Ends
from server_model.trunk import Rows, Trunk
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch
from splitfl.split.checkpoint import CheckpointFolder

RATE = 1e-4
PARTS = ("bottom", "trunk", "top", "trunk_backward", "bottom_backward", "optimizers")


class Parts:
    """Both ends at Cut(1, 1) and the trunk between them; ``seconds`` holds what each part of each step took."""

    def __init__(self, folder: Path, settings: Federation) -> None:
        cpu, source = torch.device("cpu"), CheckpointFolder(folder)
        self.ends = Ends(source, settings, Cut(1, 1), cpu)
        self.inner = Cut(1, 1).trunk(source.config.num_hidden_layers)
        self.trunk = Trunk(settings, source, self.inner, cpu)
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    def __call__(self, batch: Batch) -> float:
        """One step; returns its mean loss. Full batches only: no row is padded."""
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        with self._timed("bottom"):
            own = self.ends.run_bottom(ids, None, train=True)
        with self._timed("trunk"):
            (output,), graph = self.trunk.forward([self.inner], [Rows(own.detach(), None)], keep_graph=True)
        hidden = output.clone().requires_grad_()
        with self._timed("top"):
            loss = self.ends.run_top(hidden, lambda: own, None, labels, train=True)
        assert graph is not None
        with self._timed("trunk_backward"):
            (gradient,) = self.trunk.backward(graph, [hidden.grad], [loss.tokens])
        with self._timed("bottom_backward"):
            self.ends.backward_bottom(own, gradient, ids, None)
        with self._timed("optimizers"):
            self.ends.step_top(RATE, loss.tokens)
            self.ends.step_bottom(RATE, loss.tokens)
            self.trunk.step(RATE)
        return float(loss.total) / loss.tokens

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part].append(time.perf_counter() - began)
