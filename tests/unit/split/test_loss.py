"""The chunked loss is the model's own loss, and its gradients are the model's own, for every size of chunk."""

from __future__ import annotations

import pytest
import torch
from helpers import HIDDEN, VOCAB, MemorySource, tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from splitfl.split import loss
from splitfl.split.checkpoint import load_segment
from splitfl.split.chunks import LOGIT_BYTES, chunk_tokens, chunks
from splitfl.split.loss import IGNORE, head_loss
from splitfl.split.segment import Piece, Segment

BATCH, TIME = 2, 9


def head_of(model: PreTrainedModel) -> Segment:
    layers = model.config.num_hidden_layers
    return load_segment(MemorySource.of(model), Piece(layers, layers, head=True)).requires_grad_(True)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) behind the final norm, and labels (B, T) of which some carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, TIME, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, TIME), generator=generator)
    labels[0, 3:5] = labels[1, 7:] = IGNORE
    return hidden, labels


def set_chunk(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda _vocab: tokens)


def own_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient at the hidden states and gradient of the head, by the model's own code on whole logits."""
    leaf = hidden.clone().requires_grad_()
    head = model.get_output_embeddings().weight
    head.grad = None
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _module, _inputs: (leaf,))
    try:
        logits = model(input_ids=torch.zeros(BATCH, TIME, dtype=torch.long), use_cache=False).logits  # (B, T, V)
    finally:
        handle.remove()
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    total.backward()
    assert leaf.grad is not None
    assert head.grad is not None
    return float(total.detach()), leaf.grad, head.grad


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13, 14, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_chunked_loss_equals_the_models_own(family: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, layers=1)
    if family == "gemma2":
        model.config.final_logit_softcapping = 2.0  # low enough to bend these logits
    hidden, labels = batch()
    expected, at_hidden, at_head = own_loss(model, hidden, labels)
    set_chunk(monkeypatch, size)
    segment = head_of(model)
    leaf = hidden.clone().requires_grad_()
    result = head_loss(segment, leaf, labels, train=True)
    assert result.tokens == 14
    assert result.total == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(leaf.grad, at_hidden, rtol=1e-5, atol=1e-6)
    head = segment.model.get_submodule(segment.anatomy.head).weight
    torch.testing.assert_close(head.grad, at_head, rtol=1e-5, atol=1e-5)
    evaluated = head_loss(segment, hidden, labels, train=False)
    assert evaluated.total == pytest.approx(expected, rel=1e-6)
    assert evaluated.tokens == 14


def test_softcap_of_gemma2_changes_the_loss() -> None:
    """Or else the test above would not hold the head code to it."""
    model = tiny_model("gemma2", layers=1)
    hidden, labels = batch()
    losses = []
    for cap in (2.0, 30.0):
        model.config.final_logit_softcapping = cap
        losses.append(head_loss(head_of(model), 3 * hidden, labels, train=False).total)
    assert abs(losses[0] - losses[1]) > 0.1


def test_loss_gradient_flows_into_the_blocks_before_the_head() -> None:
    segment = head_of(tiny_model("llama", layers=1))
    hidden, labels = batch()
    scale = torch.ones((), requires_grad=True)
    head_loss(segment, hidden * scale, labels, train=True)
    direct = hidden.clone().requires_grad_()
    head_loss(segment, direct, labels, train=True)
    assert direct.grad is not None
    assert float(scale.grad) == pytest.approx(float((direct.grad * hidden).sum()), rel=1e-4)


def test_loss_gradients_accumulate_over_micro_batches() -> None:
    segment = head_of(tiny_model("llama", layers=1))
    head = segment.model.get_submodule("lm_head").weight
    singles = []
    for seed in (1, 2):
        head.grad = None
        head_loss(segment, *batch(seed), train=True)
        singles.append(head.grad)
    head.grad = None
    for seed in (1, 2):
        head_loss(segment, *batch(seed), train=True)
    torch.testing.assert_close(head.grad, singles[0] + singles[1])


def test_loss_of_a_frozen_head_still_reaches_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", layers=1)
    hidden, labels = batch()
    _, at_hidden, _ = own_loss(model, hidden, labels)
    set_chunk(monkeypatch, 3)
    segment = head_of(model).requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    head_loss(segment, leaf, labels, train=True)
    torch.testing.assert_close(leaf.grad, at_hidden, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in segment.parameters())


def test_loss_trains_the_head_when_hidden_states_want_no_gradient() -> None:
    segment = head_of(tiny_model("llama", layers=1))
    hidden, labels = batch()
    head_loss(segment, hidden, labels, train=True)
    assert hidden.grad is None
    assert segment.model.get_submodule("lm_head").weight.grad is not None


def test_loss_where_nothing_trains_is_still_measured() -> None:
    segment = head_of(tiny_model("llama", layers=1)).requires_grad_(False)
    hidden, labels = batch()
    assert head_loss(segment, hidden, labels, train=True) == head_loss(segment, hidden, labels, train=False)


def test_loss_without_training_leaves_no_gradient() -> None:
    segment = head_of(tiny_model("llama", layers=1))
    hidden, labels = batch()
    head_loss(segment, hidden.requires_grad_(), labels, train=False)
    assert hidden.grad is None
    assert all(parameter.grad is None for parameter in segment.parameters())


def test_loss_of_labels_that_carry_none_is_zero_with_zero_gradient() -> None:
    segment = head_of(tiny_model("llama", layers=1))
    hidden, labels = batch()
    leaf = hidden.clone().requires_grad_()
    result = head_loss(segment, leaf, torch.full_like(labels, IGNORE), train=True)
    assert (result.total, result.tokens) == (0.0, 0)
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_loss_is_finite_and_fp32_for_bf16_heads() -> None:
    model = tiny_model("llama", layers=1)
    hidden, labels = batch()
    exact = head_loss(head_of(model), hidden, labels, train=False).total
    rounded = head_loss(head_of(model.bfloat16()), hidden.bfloat16(), labels, train=False).total
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_chunk_keeps_its_logits_below_the_limit() -> None:
    for vocab in (1, 300, 32_000, 152_064, 1 << 30):
        tokens = chunk_tokens(vocab)
        assert tokens >= 1
        assert tokens == 1 or 4 * vocab * tokens <= LOGIT_BYTES
    assert chunk_tokens(1000, logit_bytes=8000) == 2


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (5, 1)])
def test_chunks_cover_every_token_once(count: int, size: int) -> None:
    pieces = list(chunks(count, size))
    assert [i for begin, end in pieces for i in range(begin, end)] == list(range(count))
    assert all(0 < end - begin <= size for begin, end in pieces)
