"""The trunk: the blocks on the server, as one module with its optimizer. Pure torch; one thread calls it.

Clients run as one batch through every block that they share: rows join where their client's range of blocks begins
and leave where it ends. Gradients come summed over label tokens and are divided, per block, by the tokens that
crossed it in the step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from splitfl.config import Federation
from splitfl.split.checkpoint import TensorSource, load_segment
from splitfl.split.modes import arithmetic, optimizer_spec, training_policy
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.segment import Piece
from splitfl.split.training import set_up_training


@dataclass(frozen=True, eq=False)
class Rows:
    """What one client brings into a joint batch: hidden states (B, T, D), true lengths (B,) or None."""

    hidden: Tensor
    lengths: Tensor | None


@dataclass(eq=False)
class Graph:
    """A joint forward that waits for its gradients: inputs and outputs (sum of B, longest T, D)."""

    blocks: Sequence[range]  # of each client
    inputs: Tensor
    outputs: Tensor
    shapes: list[tuple[int, int]]  # (B, T) of each client's rows


@dataclass
class Trunk:
    """Blocks ``blocks`` (global numbers) of the model, on ``device``."""

    settings: Federation
    source: TensorSource
    blocks: range
    device: torch.device
    tokens: Counter[int] = field(default_factory=Counter)  # block -> label tokens in the current step
    round_tokens: Counter[int] = field(default_factory=Counter)  # the same over the round, of steps that were applied

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The base model's weights and no moments."""
        layers = self.source.config.num_hidden_layers
        self.segment = load_segment(self.source, Piece(self.blocks.start, self.blocks.stop))
        set_up_training(self.segment, training_policy(self.settings, layers, self.device))
        self.segment.to(self.device)
        self.optimizer = PartOptimizer(self.trainable(), optimizer_spec(self.settings))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Global name -> trainable weight."""
        return self.segment.trainable()

    def forward(
        self, blocks: Sequence[range], clients: Sequence[Rows], *, keep_graph: bool
    ) -> tuple[list[Tensor], Graph | None]:
        """Run each client's rows through its blocks; outputs in the clients' order, and what a backward needs."""
        inputs, lengths = join(clients)
        inputs.requires_grad_(keep_graph)
        shapes = [(rows.hidden.shape[0], rows.hidden.shape[1]) for rows in clients]
        with torch.set_grad_enabled(keep_graph), arithmetic(self.settings, self.device):
            outputs = self._through_own(blocks, inputs, lengths, [batch for batch, _ in shapes])
        graph = Graph(blocks, inputs, outputs, shapes) if keep_graph else None
        return part(outputs.detach(), shapes), graph

    def _through_own(self, blocks: Sequence[range], hidden: Tensor, lengths: Tensor | None, sizes: list[int]) -> Tensor:
        """A joint batch (sum of ``sizes``, T, D) -> the same behind each client's own blocks."""
        stretches = shared_stretches(blocks)
        if len(stretches) == 1:
            return self._through(stretches[0], hidden, lengths)
        rows = list(torch.split_with_sizes(hidden, sizes))
        known = [] if lengths is None else torch.split_with_sizes(lengths, sizes)
        for stretch in stretches:
            inside = [number for number, own in enumerate(blocks) if stretch.start in own]
            true = torch.cat([known[number] for number in inside]) if known else None
            joint = self._through(stretch, torch.cat([rows[number] for number in inside]), true)
            pieces = torch.split_with_sizes(joint, [sizes[number] for number in inside])
            for number, piece in zip(inside, pieces, strict=True):
                rows[number] = piece
        return torch.cat(rows)

    def _through(self, blocks: range, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        output: Tensor = self.segment.narrow(blocks.start, blocks.stop)(hidden, lengths)
        return output

    def backward(self, graph: Graph, gradients: Sequence[Tensor | None], tokens: Sequence[int]) -> list[Tensor]:
        """One backward for the joint batch; a client that was dropped brings None. Gradients at the inputs.

        Each record's gradient is first clipped to ``trunk.gradient_clip_norm``, where that is set.
        """
        joint = torch.zeros_like(graph.outputs)
        for view, gradient in zip(part(joint, graph.shapes), gradients, strict=True):
            if gradient is not None:
                view.copy_(self._bounded(gradient))
        graph.outputs.backward(joint)  # type: ignore[no-untyped-call]
        for own, count, gradient in zip(graph.blocks, tokens, gradients, strict=True):
            if gradient is not None:
                self.tokens.update(dict.fromkeys(own, count))
        assert graph.inputs.grad is not None
        return part(graph.inputs.grad, graph.shapes)

    def _bounded(self, gradient: Tensor) -> Tensor:
        """Records' gradients (B, T, D) of their summed losses, each within the norm that the settings allow."""
        limit = self.settings.trunk.gradient_clip_norm
        if not limit:
            return gradient
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True, dtype=torch.float64)
        bounded: Tensor = gradient * (limit / norms.clamp_min(limit))
        return bounded

    def step(self, learning_rate: float) -> float:
        """Apply the step's gradients; returns their norm (not finite: nothing moved)."""
        norm = self.optimizer.step(learning_rate, lambda name: self.tokens[self._block(name)])
        if math.isfinite(norm):
            self.round_tokens += self.tokens
        self.tokens.clear()
        return norm

    def clear(self) -> None:
        """Forget gradients of a step that will not be finished."""
        self.optimizer.clear()
        self.tokens.clear()

    def tokens_through(self, name: str) -> int:
        """Label tokens that trained the weight ``name`` here in this round."""
        return self.round_tokens[self._block(name)]

    def _block(self, name: str) -> int:
        block = self.segment.block_of(name)
        assert block is not None
        return block

    def weights(self) -> dict[str, Tensor]:
        """Trained weights by global name, on the CPU."""
        return {name: weight.detach().cpu() for name, weight in self.trainable().items()}

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite those trained weights that ``tensors`` names."""
        with torch.no_grad():
            for name, weight in self.trainable().items():
                if name in tensors:
                    weight.copy_(tensors[name])


def shared_stretches(blocks: Sequence[range]) -> list[range]:
    """Ranges of several clients -> the longest ranges over which nobody joins or leaves, from the bottom up.

    Blocks in which nobody is are left out: 1..3 and 2..5 and 7..9 give 1, 2..3, 4..5 and 7..9 (ends included).
    """
    edges = sorted({edge for own in blocks for edge in (own.start, own.stop)})
    stretches = [range(start, stop) for start, stop in pairwise(edges)]
    return [stretch for stretch in stretches if any(stretch.start in own for own in blocks)]


def join(clients: Sequence[Rows]) -> tuple[Tensor, Tensor | None]:
    """Rows of several clients -> one batch padded on the right to the longest, and lengths when any is padded."""
    longest = max(rows.hidden.shape[1] for rows in clients)
    padded = [nn.functional.pad(rows.hidden, (0, 0, 0, longest - rows.hidden.shape[1])) for rows in clients]
    joint = torch.cat(padded) if len(padded) > 1 else padded[0].detach()
    if all(rows.lengths is None and rows.hidden.shape[1] == longest for rows in clients):
        return joint, None
    return joint, torch.cat([true_lengths(rows) for rows in clients])


def true_lengths(rows: Rows) -> Tensor:
    if rows.lengths is not None:
        return rows.lengths
    batch, time = rows.hidden.shape[:2]
    return torch.full((batch,), time, device=rows.hidden.device)


def part(joint: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of each client's rows in a joint tensor."""
    views, start = [], 0
    for batch, time in shapes:
        views.append(joint[start : start + batch, :time])
        start += batch
    return views
