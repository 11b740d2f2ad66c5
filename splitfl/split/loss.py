"""The head's loss in token chunks, so that B*T*V logits never exist at once.

For Qwen's 152k words and 4,096 tokens whole logits are 2.5 GB, and as much again for their gradient. Here each
chunk's logits live only between its own forward and backward; what stays is one gradient (N, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from splitfl.split.chunks import chunk_tokens, chunks
from splitfl.split.segment import Segment

IGNORE = -100  # label of positions that carry no loss


@dataclass(frozen=True)
class HeadLoss:
    """Cross-entropy summed over label tokens, in nats, and how many there were."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token; 0 over none."""
        return self.total / max(1, self.tokens)


def head_loss(segment: Segment, hidden_states: Tensor, labels: Tensor, *, train: bool) -> HeadLoss:
    """Summed loss of (B, T, D) hidden states behind the final norm against labels (B, T) that are already shifted.

    With ``train`` it also runs backward: gradients of the *summed* loss accumulate in the head, and flow on
    through ``hidden_states`` into the blocks before it.
    """
    wanted = labels != IGNORE  # (B, T)
    rows, targets = hidden_states[wanted], labels[wanted]  # (N, D), (N,)
    gradient = torch.empty_like(rows) if train and rows.requires_grad else None
    total = 0.0
    for begin, end in chunks(len(targets), chunk_tokens(segment.model.config.vocab_size)):
        with torch.set_grad_enabled(train):
            piece = rows[begin:end].detach().requires_grad_(gradient is not None)
            loss = F.cross_entropy(segment.logits(piece).float(), targets[begin:end], reduction="sum")
        if train and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        if gradient is not None and piece.grad is not None:
            gradient[begin:end] = piece.grad
        total += float(loss.detach())
    if gradient is not None:
        rows.backward(gradient)  # type: ignore[no-untyped-call]
    return HeadLoss(total, len(targets))
