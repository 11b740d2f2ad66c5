"""Whether a trained model remembers planted sequences: exposure (Carlini et al. 2019, The Secret Sharer, section 4).

Sequences of one format with random content are planted in training text. After training, each is ranked by its loss
among candidates of the same format that were not planted: exposure = log2(number) - log2(rank). A model that remembers
nothing gives about 1.44 bits on average (1 / ln 2), one that remembers everything log2(number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from splitfl.errors import DataError
from splitfl.split.segment import Segment


def canary_exposure(model: Segment, canaries: Sequence[Tensor], candidates: Sequence[Tensor]) -> list[float]:
    """Exposure in bits of each canary (t,) among ``candidates`` (t,) of the same format.

    ``model`` holds all blocks and both ends. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("exposure is a rank among candidates, and there are none")
    others = torch.tensor([sequence_loss(model, candidate) for candidate in candidates])
    ranks = [1 + int((others < sequence_loss(model, canary)).sum()) for canary in canaries]
    return [math.log2(len(candidates) + 1) - math.log2(rank) for rank in ranks]


def texts_like(canary: str, count: int, generator: torch.Generator) -> list[str]:
    """``count`` texts of the canary's format: every digit drawn anew. Raises DataError for a text without digits."""
    places = [place for place, letter in enumerate(canary) if letter.isdecimal()]
    if not places:
        raise DataError(f"the canary {canary!r} has no digits to vary", "Plant texts such as 'my code is 281265017'.")
    texts = []
    for digits in torch.randint(10, (count, len(places)), generator=generator).tolist():
        letters = list(canary)
        for place, digit in zip(places, digits, strict=True):
            letters[place] = str(digit)
        texts.append("".join(letters))
    return texts


@torch.no_grad()
def sequence_loss(model: Segment, ids: Tensor) -> float:
    """Summed loss of a sequence (t,) behind its first token, in nats (the paper's log-perplexity)."""
    final = model(model.embed(ids[None]))[0, :-1]
    return float(F.cross_entropy(model.logits(final).float(), ids[1:], reduction="sum"))
