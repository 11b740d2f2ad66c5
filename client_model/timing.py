"""How fast this machine computes: one real block of the model and its head, as a client would train them.

A few tokens first, then more until a run takes long enough to be measured or is a whole micro-batch: so a slow machine
answers in the time that a fast one does. The first run of each size is a warm-up; of the others the
median counts, for somebody else always uses a machine now and then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from splitfl.config import Federation
from splitfl.split.checkpoint import TensorSource, load_segment
from splitfl.split.loss import head_loss
from splitfl.split.modes import arithmetic, optimizer_spec, training_policy
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.segment import Piece
from splitfl.split.training import set_up_training

FIRST_TOKENS, GROWTH = 16, 4
LEAST_RUNS, MOST_RUNS = 3, 9
BLOCK_S, FROZEN_S, HEAD_S, UPDATE_S = 0.5, 0.2, 0.6, 0.1  # seconds that measuring each may take, about


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times: least, median, greatest."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Raises ValueError for no values."""
        return cls(min(values), statistics.median(values), max(values))

    def scaled(self, factor: float) -> Spread:
        """The same in other units."""
        return Spread(self.low * factor, self.median * factor, self.high * factor)

    def __add__(self, other: Spread) -> Spread:
        """Of two things one after the other; the extremes are as if they came together."""
        return Spread(self.low + other.low, self.median + other.median, self.high + other.high)


@dataclass(frozen=True)
class Pace:
    """Seconds a token: of a trained block (forward, backward, its share of the update), of a frozen one (forward), and
    of the head with its loss, backward and update."""

    block: Spread
    frozen_block: Spread
    head: Spread


class Specimen:
    """The model's last block, final norm and head on ``device``, trained as ``settings`` say, in ``dtype``."""

    def __init__(self, source: TensorSource, settings: Federation, device: torch.device, dtype: str) -> None:
        layers = source.config.num_hidden_layers
        model = settings.model.model_copy(update={"freeze_below": 0, "compute": dtype})
        self.settings = settings.model_copy(update={"model": model})
        self.device = device
        self.top = load_segment(source, Piece(layers - 1, layers, head=True))
        set_up_training(self.top, training_policy(self.settings, layers, device))
        self.top.to(device)
        self.block = self.top.narrow(layers - 1, layers)
        self.width: int = source.config.hidden_size
        self.words: int = source.config.vocab_size
        block = dict(self.block.trainable())
        spec = optimizer_spec(settings, client=True)
        self.optimizers = {
            "block": PartOptimizer(block, spec),
            "head": PartOptimizer({name: w for name, w in self.top.trainable().items() if name not in block}, spec),
        }

    def hidden(self, rows: int, length: int) -> Tensor:
        """Made-up hidden states (rows, length, D), always the same."""
        made = torch.randn(rows, length, self.width, generator=torch.Generator().manual_seed(0))
        return made.to(self.device)

    def train_block(self, hidden: Tensor) -> None:
        """Forward and backward of the block over (B, T, D)."""
        with arithmetic(self.settings, self.device):
            output = self.block(hidden.requires_grad_(True))
        output.backward(hidden.detach())

    def run_frozen(self, hidden: Tensor) -> None:
        """Forward of the block without a graph."""
        with torch.no_grad(), arithmetic(self.settings, self.device):
            self.block(hidden)

    def train_head(self, hidden: Tensor) -> None:
        """Loss over (B, T, D) and its backward, in chunks as ever."""
        labels = torch.arange(hidden.shape[0] * hidden.shape[1], device=self.device).reshape(hidden.shape[:2])
        with arithmetic(self.settings, self.device):
            head_loss(self.top, hidden.requires_grad_(True), labels % self.words, train=True)

    def update(self, part: str) -> None:
        """One optimizer step of ``part``, on gradients that are there for it alone."""
        optimizer = self.optimizers[part]
        for weight in optimizer.named.values():
            weight.grad = torch.zeros_like(weight)
        optimizer.step(0.0, lambda _: 1)


def measure_pace(source: TensorSource, settings: Federation, device: torch.device, dtype: str) -> Pace:
    """The pace of ``dtype`` ("fp32" or "bf16"). Raises whatever torch raises where memory is short."""
    specimen = Specimen(source, settings, device, dtype)
    batch = settings.batch
    share = 1 / (batch.records * batch.max_length)  # of an update: once a step
    return Pace(
        per_token(specimen, specimen.train_block, BLOCK_S) + update_time(specimen, "block").scaled(share),
        per_token(specimen, specimen.run_frozen, FROZEN_S),
        per_token(specimen, specimen.train_head, HEAD_S) + update_time(specimen, "head").scaled(share),
    )


def update_time(specimen: Specimen, part: str) -> Spread:
    """Seconds of an optimizer step of ``part``; the first one makes the moments."""
    specimen.update(part)
    return timed(lambda: specimen.update(part), UPDATE_S, specimen.device, [])


def per_token(specimen: Specimen, run: Callable[[Tensor], None], budget_s: float) -> Spread:
    """Seconds a token of ``run`` in a micro-batch of the federation.

    Measured on one, or on as much of one as the budget allows, and drawn on from there by what more tokens cost on top
    of what every run does (it reads all weights).
    """
    batch = specimen.settings.batch
    whole = batch.max_length * (batch.records // batch.micro_batches)
    fewer, taken_by_fewer, tokens = 0, 0.0, min(FIRST_TOKENS, whole)
    while True:
        length = min(tokens, batch.max_length)
        hidden = specimen.hidden(tokens // length, length)
        tokens = hidden.shape[:2].numel()
        run(hidden)
        once = min(seconds(partial(run, hidden), specimen.device) for _ in range(2))
        if tokens * GROWTH > whole or (fewer and GROWTH * once * LEAST_RUNS > budget_s):
            break
        fewer, taken_by_fewer, tokens = tokens, once, GROWTH * tokens
    taken = timed(partial(run, hidden), budget_s, specimen.device, [once])
    least = taken.median / tokens / 4  # most of a run is its tokens', and what came in between must not hide that
    slope = max(least, (taken.median - taken_by_fewer) / (tokens - fewer))
    return taken.scaled((1 + (whole - tokens) * slope / taken.median) / whole)


def timed(run: Callable[[], None], budget_s: float, device: torch.device, taken: list[float]) -> Spread:
    """Seconds of ``run``, which is warm: three times at least with those ``taken`` before, and as the budget allows."""
    while len(taken) < LEAST_RUNS or (sum(taken) < budget_s and len(taken) < MOST_RUNS):
        taken.append(seconds(run, device))
    return Spread.of(taken)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall seconds of one run, a GPU's queue included."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
