"""The output head record by record: each record's loss, and its own gradient of what trains in the head.

One record's logits (T, V) live in chunks, as in ``splitfl.split.loss``, and one record's gradient of the head
(V, D) lives at a time: as much again as the head's gradient itself, whatever the batch. The matrix products are
those of an ordinary backward, cut by record. A ghost norm would need all T x V logit gradients of a record at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitfl.split.loss import IGNORE, chunk_tokens, chunks
from splitfl.split.segment import Segment


@dataclass(frozen=True)
class RecordHead:
    """What the head makes of one record; everything belongs to the record's *summed* loss."""

    loss: float  # nats, summed over label tokens
    gradient: Tensor  # at the hidden states behind the final norm, (T, D)
    weights: tuple[Tensor, ...]  # of the head's trainable weights, in their shapes

    def squared_norm(self) -> Tensor:
        """Squared norm over the head's trainable weights, float64 scalar."""
        norms = [weight.norm().double().square() for weight in self.weights]
        return torch.stack(norms).sum() if norms else torch.zeros((), dtype=torch.float64)


def head_weights(segment: Segment) -> list[nn.Parameter]:
    """The head's trainable weights."""
    head = segment.model.get_submodule(segment.anatomy.head)
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def run_record_head(segment: Segment, hidden: Tensor, labels: Tensor, weights: Sequence[nn.Parameter]) -> RecordHead:
    """Hidden states (T, D) of one record behind the final norm and its shifted labels (T,) -> loss and gradients."""
    wanted = labels != IGNORE
    rows, targets = hidden.detach()[wanted], labels[wanted]  # (N, D), (N,)
    at_rows, sums, total = torch.zeros_like(rows), [torch.zeros_like(weight) for weight in weights], 0.0
    for begin, end in chunks(len(targets), chunk_tokens(segment.model.config.vocab_size)):
        piece = rows[begin:end].requires_grad_()
        loss = F.cross_entropy(segment.logits(piece).float(), targets[begin:end], reduction="sum")
        at_rows[begin:end], *of_weights = torch.autograd.grad(loss, [piece, *weights])
        for kept, new in zip(sums, of_weights, strict=True):
            kept += new
        total += float(loss.detach())
    gradient = torch.zeros_like(hidden, requires_grad=False)
    gradient[wanted] = at_rows
    return RecordHead(total, gradient, tuple(sums))


def add_weighted_gradient(
    segment: Segment, hidden: Tensor, labels: Tensor, factors: Tensor, weights: Sequence[nn.Parameter]
) -> None:
    """Backward into the head's ``weights`` alone, each record's summed loss times its factor.

    ``hidden`` (B, T, D) behind the final norm, shifted ``labels`` (B, T), ``factors`` (B,).
    """
    wanted = labels != IGNORE
    rows, targets = hidden.detach()[wanted], labels[wanted]  # (N, D), (N,)
    scales = factors[:, None].expand_as(labels)[wanted]  # (N,)
    for begin, end in chunks(len(targets), chunk_tokens(segment.model.config.vocab_size)):
        losses = F.cross_entropy(segment.logits(rows[begin:end]).float(), targets[begin:end], reduction="none")
        torch.autograd.backward(losses @ scales[begin:end], inputs=list(weights))
