"""Oracle O1: bottom, trunk and top one after another are the whole model, to the last bit, and so is training.

Every family, every kind of cut, tied and untied, with and without padding. Backward goes by hand, detached at
the two hops as in the real system, so that nothing here rests on one autograd graph through all parts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from helpers import LAYERS, Batch, MemorySource, Parts, make_batch, split, tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from splitfl.cut import Cut
from splitfl.split.checkpoint import embedding_name, is_tied, load_segment
from splitfl.split.families import FAMILIES
from splitfl.split.loss import IGNORE, head_loss
from splitfl.split.segment import Piece

CUTS = (Cut(0, 0), Cut(1, 1), Cut(2, 3), Cut(0, LAYERS))


@dataclass(frozen=True)
class Whole:
    """What the whole model says to one batch."""

    model: PreTrainedModel
    batch: Batch
    logits: Tensor  # (B, T, V)
    loss: float  # summed over label tokens, in nats
    gradients: dict[str, Tensor]  # of the summed loss


@cache
def model_of(family: str, tied: bool) -> PreTrainedModel:
    return tiny_model(family, tie=tied).train()


@cache
def whole_of(family: str, tied: bool, padded: bool) -> Whole:
    model, batch = model_of(family, tied), make_batch(padded=padded)
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Whole(model, batch, logits.detach(), float(loss.detach()), gradients)


def split_logits(parts: Parts, batch: Batch) -> Tensor:
    """Logits (B, T, V) of the three parts in a row."""
    with torch.no_grad():
        hidden = parts.bottom(parts.bottom.embed(batch.ids), batch.lengths)
        hidden = parts.top(parts.trunk(hidden, batch.lengths), batch.lengths)
        logits = parts.top.logits(hidden.flatten(0, 1))  # (B*T, V)
    return logits.unflatten(0, batch.ids.shape)


def split_training_pass(parts: Parts, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and the gradient of every weight, hop by hop: what crosses a hop is a plain tensor."""
    for part in parts:
        part.requires_grad_(True).train()
    sent = parts.bottom(parts.bottom.embed(batch.ids), batch.lengths)
    arrived = sent.detach().requires_grad_()
    answered = parts.trunk(arrived, batch.lengths)
    received = answered.detach().requires_grad_()
    loss = head_loss(parts.top, parts.top(received, batch.lengths), batch.labels, train=True)
    answered.backward(received.grad)
    sent.backward(arrived.grad)
    gradients: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    head, embedding = f"{parts.top.anatomy.head}.weight", embedding_name(parts.top.anatomy)
    for part in parts:
        for name, parameter in part.named_weights():
            if parameter.grad is not None:
                tied_head = name == head and is_tied(part.model.config)
                gradients[embedding if tied_head else name] = (
                    gradients[embedding if tied_head else name] + parameter.grad
                )
    return loss.total, dict(gradients)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_equals_whole_model(family: str, tied: bool, cut: Cut, padded: bool) -> None:
    whole = whole_of(family, tied, padded)
    parts = split(whole.model, cut)
    batch = whole.batch
    assert float((split_logits(parts, batch) - whole.logits)[batch.valid].abs().max()) == 0.0

    loss, gradients = split_training_pass(parts, batch)
    assert loss == pytest.approx(whole.loss, rel=1e-6)
    assert gradients.keys() == whole.gradients.keys()
    for name, expected in whole.gradients.items():
        scale = float(expected.abs().max())  # sums cancel: what is small beside its tensor may differ by rounding
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-5 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_equals_whole_model_when_attention_is_eager(family: str) -> None:
    model, batch = model_of(family, False), make_batch(padded=True)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        logits = split_logits(split(model, Cut(1, 1), attention="eager"), batch)
    finally:
        model.set_attn_implementation(before)
    assert float((logits - expected)[batch.valid].abs().max()) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_segment_equals_one_loaded_for_its_blocks(family: str) -> None:
    model = model_of(family, False)
    source = MemorySource.of(model)
    wide = load_segment(source, Piece(1, 5))
    hidden, lengths = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([20, 13, 5])
    for start, stop in [(1, 5), (2, 4), (1, 2), (4, 5), (3, 3)]:
        view, own = wide.narrow(start, stop), load_segment(source, Piece(start, stop))
        for given in (None, lengths):
            valid = torch.arange(20) < (torch.full((3,), 20) if given is None else given)[:, None]
            assert torch.equal(view(hidden, given)[valid], own(hidden, given)[valid])
        assert [name for name, _ in view.named_weights()] == [name for name, _ in own.named_weights()]
        shared = dict(wide.named_weights())
        assert all(parameter is shared[name] for name, parameter in view.named_weights())
    assert torch.equal(wide(hidden), load_segment(source, Piece(1, 5))(hidden))  # views left it as it was
