"""What can be guessed without any release: the commonest token, and what a language model expects.

A recovery means something only above these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfl.lab.audit.model import Prefixes
from splitfl.lab.audit.public import Knowledge


def majority_guess(knowledge: Knowledge, shape: tuple[int, int]) -> Tensor:
    """Public text's commonest token everywhere, (B, T)."""
    return torch.full(shape, int(knowledge.log_unigram.argmax()))


def informed_guess(knowledge: Knowledge, ids: Tensor) -> Tensor:
    """The public model's likeliest token behind the *true* prefix, (B, T): it is told every token but the one."""
    first = knowledge.log_unigram.argmax().expand(len(ids), 1)
    return torch.cat([first, knowledge.model.next_log_probs(ids)[:, :-1].argmax(-1)], dim=1)


def own_guess(knowledge: Knowledge, shape: tuple[int, int]) -> Tensor:
    """The public model's greedy text from nothing, the same for every record, (B, T)."""
    prefixes = Prefixes(knowledge.model.whole, 1)
    tokens = [knowledge.log_unigram.argmax().expand(1)]
    while len(tokens) < shape[1]:
        with torch.no_grad():
            tokens.append(knowledge.model.whole.logits(prefixes.extend(tokens[-1])).argmax(-1))
    return torch.cat(tokens).expand(shape)
