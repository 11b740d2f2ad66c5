"""Which tokens a client trained on, from its update of the output head.

Descent moves a label's row along the hidden states that met it, and every other row against them (softmax - onehot):
the sign of a row's step, seen along the mean public hidden state, tells the two apart. Zhao, Mopuri and Bilen 2020
(iDLG); as a bag of tokens from a language model's update: Gupta et al. 2022 (FILM). It names a set, not an order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.lab.audit.observed import HeadUpdate
from splitfl.lab.audit.public import Knowledge

DEVIATIONS = 3.0  # of the noise, above which a row counts as moved


@dataclass(frozen=True)
class BagResult:
    """How a named set of tokens compares with the set that was trained on; ``by_frequency``: F1 of naming as many of
    public text's commonest tokens."""

    precision: float
    recall: float
    f1: float
    by_frequency: float


def bag_from_update(knowledge: Knowledge, update: HeadUpdate) -> Tensor:
    """Token ids (N,) whose rows moved as labels' rows do."""
    direction = mean_final_state(knowledge)  # (D,)
    step = update.after.float() - update.before.float()
    along = step @ direction  # (V,)
    threshold = DEVIATIONS * update.sigma + 1e-6 * float(along.abs().max())
    return (along > threshold).nonzero().squeeze(-1)


@torch.no_grad()
def mean_final_state(knowledge: Knowledge) -> Tensor:
    """The direction that public text's states have in common where they meet the head, (D,), of length 1."""
    whole, texts = knowledge.model.whole, knowledge.held_out
    final = whole(whole.embed(texts.ids))[texts.mask]
    return torch.nn.functional.normalize(final.mean(0), dim=0)


def score_bag(knowledge: Knowledge, named: Tensor, update: HeadUpdate) -> BagResult:
    """Precision and recall of ``named`` against the tokens that were trained on."""
    truth = set(update.token_ids.tolist())
    precision, recall, f1 = set_scores(set(named.tolist()), truth)
    common = knowledge.log_unigram.topk(len(named)).indices
    return BagResult(precision, recall, f1, set_scores(set(common.tolist()), truth)[2])


def set_scores(named: set[int], truth: set[int]) -> tuple[float, float, float]:
    """Precision, recall and F1 of a set."""
    right = len(named & truth)
    precision, recall = right / max(1, len(named)), right / max(1, len(truth))
    return precision, recall, 2 * right / max(1, len(named) + len(truth))
