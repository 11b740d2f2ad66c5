"""Nearest neighbour: each released vector is taken for the token whose public state lies closest.

Song and Raghunathan 2020 (Information Leakage in Embedding Models, section 3). At depth 0 the states are the rows of
the embedding; deeper, each token's mean state over public contexts, moved to its position. Releases of a record come
averaged. The simplest attack: whatever is trained must not be weaker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfl.lab.audit.public import Knowledge


def nearest_tokens(knowledge: Knowledge, released: Tensor) -> Tensor:
    """(B, T, R) -> token ids (B, T). By angle where records are clipped whole: their factor is not known."""
    guesses = torch.empty(released.shape[:2], dtype=torch.long)
    for position in range(released.shape[1]):
        rows = knowledge.bank + knowledge.offsets[position]  # (V, R)
        if knowledge.mechanism.clip == "record":
            rows, level = torch.nn.functional.normalize(rows, dim=-1), torch.zeros(len(rows))
        else:
            level = rows.square().sum(-1) / 2
        guesses[:, position] = (released[:, position] @ rows.T - level).argmax(-1)
    return guesses
