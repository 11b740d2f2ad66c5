"""The output head record by record: each record's loss, and its own gradient of what trains in the head.

One record's logits (T, V) live in chunks, as in ``splitfl.split.loss``, and one record's gradient of the head
(V, D) lives at a time: as much again as the head's gradient itself, whatever the batch. The matrix products are
those of an ordinary backward, cut by record. A ghost norm would need all T x V logit gradients of a record at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitfl.split.chunks import chunk_tokens, chunks
from splitfl.split.loss import IGNORE
from splitfl.split.segment import Segment


@dataclass(frozen=True)
class RecordHead:
    """What the head makes of one record; everything belongs to the record's *summed* loss."""

    loss: float  # nats, summed over label tokens
    gradient: Tensor  # at the hidden states behind the final norm, (T, D)
    weights: tuple[Tensor, ...]  # of the head's trainable weights, in their shapes


def squared_norm(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Of one record's gradients together, float64 scalar.

    Row by row and then in float64: torch's fp32 norm of 1e8 numbers is off by 3e-3 on a CPU (measured), and a norm
    that comes out too small lets more through than the clip says.
    """
    rows = [torch.linalg.vector_norm(g, dim=-1).double().square().sum() for g in gradients if g is not None]
    return torch.stack(rows).sum() if rows else torch.zeros((), dtype=torch.float64, device=device)


def head_weights(segment: Segment) -> list[nn.Parameter]:
    """The head's trainable weights."""
    head = segment.model.get_submodule(segment.anatomy.head)
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def run_record_head(segment: Segment, hidden: Tensor, labels: Tensor, weights: Sequence[nn.Parameter]) -> RecordHead:
    """Hidden states (T, D) of one record behind the final norm and its shifted labels (T,) -> loss and gradients."""
    wanted = labels != IGNORE
    rows, targets = hidden.detach()[wanted], labels[wanted]  # (N, D), (N,)
    at_rows, total = torch.empty_like(rows), 0.0
    sums: tuple[Tensor, ...] = ()
    for begin, end in chunks(len(targets), chunk_tokens(segment.model.config.vocab_size)):
        piece = rows[begin:end].requires_grad_()
        loss = F.cross_entropy(segment.logits(piece).float(), targets[begin:end], reduction="sum")
        at_rows[begin:end], *new = torch.autograd.grad(loss, [piece, *weights])
        sums = tuple(kept.add_(more) for kept, more in zip(sums, new, strict=True)) if sums else tuple(new)
        total += float(loss.detach())
    gradient = torch.zeros_like(hidden, requires_grad=False)
    gradient[wanted] = at_rows
    return RecordHead(total, gradient, sums or tuple(torch.zeros_like(weight) for weight in weights))


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
