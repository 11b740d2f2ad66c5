"""DP-SGD's clipped sums against the slow, obvious way: each record alone, plain autograd, one vector, one norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import HIDDEN, Batch, MemorySource, make_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F

from splitfl.privacy.dp_sgd import DpSgd, Method, PrivateBottom, PrivatePart, PrivateTop
from splitfl.split.checkpoint import load_segment
from splitfl.split.families import FAMILIES
from splitfl.split.segment import Piece, Segment
from splitfl.split.training import TrainingPolicy, set_up_training, tie_head

TOLERANCE = 1e-6  # relative, as L2 norms
FULL = TrainingPolicy()
LORA = TrainingPolicy(train="lora", head="lora", lora_rank=4)
LORA_AB = TrainingPolicy(train="lora", head="full", lora_rank=4, train_a_blocks=range(6))
POLICIES = {"full": FULL, "lora": LORA, "lora with A": LORA_AB}
HUGE, TINY = 1e6, 1e-4

Gradients = dict[str, Tensor]  # by global name


class NoNoise:
    """A source that draws zeros: what is left is the clipped sum."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def ends(family: str, policy: TrainingPolicy, *, tied: bool = False) -> tuple[Segment, Segment]:
    """Bottom and top of a small model, two blocks each, ready to train; LoRA's B away from zero."""
    source = MemorySource.of(tiny_model(family, tie=tied))
    bottom, top = (load_segment(source, piece) for piece in (Piece(0, 2, embedding=True), Piece(4, 6, head=True)))
    generator = torch.Generator().manual_seed(5)
    for segment in (bottom, top):
        set_up_training(segment, policy)
        for name, weight in segment.named_weights():
            if ".lora_B." in name:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    if tied:
        tie_head(top, bottom.embedding)
    return bottom, top


def normal(batch: Batch, seed: int, scale: float = 1.0) -> Tensor:
    """(B, T, D)"""
    return scale * torch.randn(*batch.ids.shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def oracle(segment: Segment, loss_of: Callable[[int], Tensor], records: int, limit: float, time: int) -> Gradients:
    """Sum over records of the gradient of loss / T, clipped to ``limit``: each record alone, in float64 from there."""
    named = {name: weight for name, weight in segment.named_weights() if weight.requires_grad}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in named.items()}
    for record in range(records):
        found = torch.autograd.grad(loss_of(record) / time, list(named.values()), allow_unused=True)
        own = [torch.zeros_like(w) if g is None else g for w, g in zip(named.values(), found, strict=True)]
        norm = torch.cat([gradient.flatten().double() for gradient in own]).norm()
        for name, gradient in zip(named, own, strict=True):
            total[name] += gradient.double() * min(1.0, limit / float(norm))
    return total


def top_oracle(top: Segment, hidden: Tensor, batch: Batch, limit: float) -> Gradients:
    def loss_of(record: int) -> Tensor:
        length = None if batch.lengths is None else batch.lengths[record : record + 1]
        logits = top.logits(top(hidden[record : record + 1], length)[0])
        return F.cross_entropy(logits, batch.labels[record], reduction="sum")

    return oracle(top, loss_of, len(hidden), limit, batch.ids.shape[1])


def bottom_oracle(bottom: Segment, gradient: Tensor, batch: Batch, limit: float) -> Gradients:
    def loss_of(record: int) -> Tensor:
        length = None if batch.lengths is None else batch.lengths[record : record + 1]
        return (bottom(bottom.embed(batch.ids[record : record + 1]), length) * gradient[record]).sum()

    return oracle(bottom, loss_of, len(gradient), limit, batch.ids.shape[1])


def finished(part: PrivatePart) -> Gradients:
    """The step's sum as the optimizer would find it; ``grad`` is empty again."""
    part.finish()
    named = {name: weight for name, weight in part.segment.named_weights() if weight.requires_grad}
    found = {name: weight.grad for name, weight in named.items() if weight.grad is not None}
    for weight in named.values():
        weight.grad = None
    return found


def assert_same(found: Gradients, expected: Gradients) -> None:
    """Equal to 1e-6 as vectors, and every weight's share to 1e-5 of its own norm: fp32 rounds no finer."""
    assert found.keys() == expected.keys()
    gaps = {name: float((found[name] - tensor).norm()) for name, tensor in expected.items()}
    norms = {name: float(tensor.norm()) for name, tensor in expected.items()}
    assert math.hypot(*norms.values()) > 0
    assert math.hypot(*gaps.values()) <= TOLERANCE * math.hypot(*norms.values())
    for name, gap in gaps.items():
        assert gap <= 10 * TOLERANCE * norms[name] + 1e-9 * math.hypot(*norms.values()), name


def middle(norm_of: Callable[[float], Gradients]) -> float:
    """A clip that some records exceed and some do not: found from the sum of unclipped gradients."""
    total = norm_of(HUGE)
    return 0.4 * float(torch.cat([tensor.flatten() for tensor in total.values()]).norm())


CASES = [
    (family, policy, tied, True)
    for family in FAMILIES
    for policy, tied in (("full", False), ("full", True), ("lora", False), ("lora with A", False))
]
UNPADDED = [(family, "full", False, False) for family in ("llama", "gpt2", "gemma2", "gpt_oss")]


@pytest.mark.parametrize("method", ["ghost", "record"])
@pytest.mark.parametrize(("family", "policy", "tied", "padded"), CASES + UNPADDED)
def test_clipped_sums_equal_each_record_alone(
    family: str, policy: str, tied: bool, padded: bool, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends, the head's loss in several chunks, at a clip between the records' norms."""
    bottom, top = ends(family, POLICIES[policy], tied=tied)
    batch = make_batch(padded=padded)
    hidden, returned = normal(batch, 1), normal(batch, 2, 0.01)

    limit = middle(lambda limit: top_oracle(top, hidden, batch, limit))
    expected = top_oracle(top, hidden, batch, limit)
    monkeypatch.setattr("splitfl.privacy.record_head.chunk_tokens", lambda _: 7)
    private_top = PrivateTop(top, DpSgd(limit, 1.0), NoNoise(), method)
    loss, gradient = private_top.backward(hidden, batch.lengths, batch.labels)
    assert_same(finished(private_top), expected)
    private_top.close()
    check_release(top, hidden, batch, loss.total, gradient)

    limit = middle(lambda limit: bottom_oracle(bottom, returned, batch, limit))
    expected = bottom_oracle(bottom, returned, batch, limit)
    private_bottom = PrivateBottom(bottom, DpSgd(limit, 1.0), NoNoise(), method)
    private_bottom.backward(batch.ids, batch.lengths, returned)
    assert_same(finished(private_bottom), expected)


def check_release(top: Segment, hidden: Tensor, batch: Batch, loss: float, gradient: Tensor) -> None:
    """What goes to the gate: the gradient of the summed loss, as without DP-SGD."""
    hidden = hidden.clone().requires_grad_()
    logits = top.logits(top(hidden, batch.lengths).flatten(0, 1))
    plain = F.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(plain, hidden)
    assert loss == pytest.approx(float(plain.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
