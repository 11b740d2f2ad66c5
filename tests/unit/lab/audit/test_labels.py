"""Labels from gradients: every formula against autograd, recovery without noise, and what clip and noise do to it."""

from __future__ import annotations

import pytest
import torch

from splitfl.cut import Cut
from splitfl.lab.audit.evidence import token_scores
from splitfl.lab.audit.labels import HeadGradients, label_scores, norm_jacobians, undo
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import stack

from .bench import VOCAB, Bench, generator, share

FREE, OPEN = Mechanism("token", float("inf")), Mechanism("record", float("inf"))


def labels_recovered(bench: Bench, cut: Cut, gradients: Mechanism, activations: Mechanism = FREE) -> float:
    model = bench.model(cut)
    observed = bench.observed(model, activations, gradients=gradients)
    scores = token_scores(model, gradients, stack(observed).gradients)
    return share(scores.argmax(-1), observed, first=1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("clip", [OPEN, Mechanism("record", 0.05), Mechanism("token", 0.01)])
def test_labels_of_an_open_gradient_are_read_when_the_top_is_norm_and_head(
    bench: Bench, family: str, clip: Mechanism
) -> None:
    assert labels_recovered(Bench(bench.text, family), Cut(1, 0), clip) >= 0.98


@pytest.mark.parametrize("n_top", [1, 2])
def test_labels_are_read_through_the_blocks_of_the_top(bench: Bench, n_top: int) -> None:
    assert labels_recovered(bench, Cut(0, n_top), Mechanism("record", 0.05)) >= 0.95


def test_noise_on_activations_does_not_protect_labels(bench: Bench) -> None:
    assert labels_recovered(bench, Cut(0, 0), OPEN, Mechanism("token", 0.1, sigma=1.0)) >= 0.98


def test_enough_noise_on_gradients_hides_labels(bench: Bench) -> None:
    assert labels_recovered(bench, Cut(1, 0), Mechanism("record", 0.05, sigma=0.05)) < 0.2


def test_undo_takes_a_gradient_back_through_the_blocks(bench: Bench) -> None:
    blocks = bench.model(Cut(0, 2)).top_blocks
    hidden = torch.randn(2, 6, 64, generator=generator(1)).requires_grad_(True)
    above = torch.randn(2, 6, 64, generator=generator(2))
    (below,) = torch.autograd.grad(blocks(hidden), hidden, above)
    found = undo(blocks, hidden.detach(), below, torch.zeros(2, 1, 1))
    assert float((found - above).norm() / above.norm()) < 0.02
    assert float((below - above).norm() / above.norm()) > 0.05


def test_norm_jacobians_are_those_of_each_token(bench: Bench) -> None:
    head = bench.model(Cut(0, 0)).head
    states = torch.randn(1, 3, 64, generator=generator(1))
    found = norm_jacobians(head, states)
    for number in range(3):
        exact = torch.autograd.functional.jacobian(lambda row: head(row[None, None])[0, 0], states[0, number])
        assert torch.allclose(found[number], exact, atol=1e-5)


def test_candidate_gradients_have_the_length_that_autograd_gives(bench: Bench) -> None:
    model = bench.model(Cut(0, 0))
    states = torch.randn(1, 4, 64, generator=generator(1))
    candidates = HeadGradients(model.head, states)
    labels = torch.tensor([[7, 20, 3, VOCAB - 1]])
    exact = model.top_gradient(states, labels)[0]  # (4, D)
    assert torch.allclose(candidates._sizes(labels[0][:, None])[:, 0], exact.square().sum(-1), rtol=1e-3)
    along = candidates._along(exact).gather(1, labels[0][:, None])[:, 0]
    assert torch.allclose(along, exact.square().sum(-1), rtol=1e-3)


def test_positions_without_a_label_say_nothing(bench: Bench) -> None:
    model = bench.model(Cut(0, 0))
    hidden = torch.randn(1, 5, 64, generator=generator(1))
    labels = torch.tensor([[7, -100, 3, 9, -100]])
    scores = label_scores(model, OPEN, hidden, model.top_gradient(hidden, labels))[0].exp()
    assert scores.argmax(-1)[[0, 2, 3]].tolist() == [7, 3, 9]
    assert torch.allclose(scores[[1, 4]], torch.full((2, VOCAB), 1 / VOCAB))
