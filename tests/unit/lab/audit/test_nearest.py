"""Nearest neighbour: exact without noise at Cut(0, 0), stopped by noise, and back after enough fresh releases."""

from __future__ import annotations

import pytest
import torch

from splitfl.cut import Cut
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.nearest import nearest_tokens
from splitfl.lab.audit.observed import stack

from .bench import Bench, share

FREE = Cut(0, 0)


@pytest.mark.parametrize(
    "clip", [Mechanism("token", 0.1), Mechanism("record", 1.0), Mechanism("token", 0.1, codec="bf16")]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nearest_neighbour_reads_clipped_embeddings(bench: Bench, clip: Mechanism, family: str) -> None:
    bench = Bench(bench.text, family)
    observed = bench.observed(bench.model(FREE), clip)
    guesses = nearest_tokens(bench.knowledge(FREE, clip), stack(observed).released)
    assert share(guesses, observed) >= 0.99


def test_ten_fresh_releases_average_back_what_one_hides(bench: Bench) -> None:
    clip = 0.1  # far below the norm of this model's embeddings, so that every token is clipped
    mechanism = Mechanism("token", clip, sigma=0.4 * clip)
    knowledge = bench.knowledge(FREE, mechanism)
    once = bench.observed(knowledge.model, mechanism)
    often = bench.observed(knowledge.model, mechanism, releases=10)
    assert share(nearest_tokens(knowledge, stack(once).released), once) < 0.45
    assert share(nearest_tokens(knowledge, stack(often).released), often) >= 0.9


def test_nearest_neighbour_reads_a_narrow_release(bench: Bench) -> None:
    encoder = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) / 8
    mechanism = Mechanism("token", 0.1, encoder=encoder)
    observed = bench.observed(bench.model(FREE), mechanism)
    knowledge = bench.knowledge(FREE, mechanism)
    assert share(nearest_tokens(knowledge, stack(observed).released), observed) >= 0.99
