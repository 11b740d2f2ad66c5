"""Trying next tokens all at once gives what the bottom gives for each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitfl.cut import Cut
from splitfl.lab.audit.model import Prefixes, PublicModel

from .bench import Bench

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "glm4", "gpt_oss")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, bench: Bench) -> PublicModel:
    return Bench(bench.text, request.param).model(Cut(2, 0))


def beginnings(bench: Bench) -> Tensor:
    """Three records' first tokens, more than a sliding window holds, (3, 12)."""
    return torch.stack([record[:12] for record in bench.text.public if len(record) >= 12][:3])


def begun(model: PublicModel, ids: Tensor) -> Prefixes:
    prefixes = Prefixes(model.bottom, len(ids))
    for tokens in ids.T:
        prefixes.extend(tokens)
    return prefixes


def test_alternatives_equal_a_forward_for_each_of_them(model: PublicModel, bench: Bench) -> None:
    ids = beginnings(bench)
    tokens = torch.tensor([[5, 6, 7, 8]]).expand(3, -1)
    states = begun(model, ids).alternatives(tokens)  # (3, 4, D)
    for number, token in enumerate(tokens[0]):
        whole = torch.cat([ids, token.expand(3, 1)], dim=1)
        assert torch.allclose(states[:, number], model.hidden(whole)[:, -1], atol=1e-5)


def test_extending_equals_one_forward(model: PublicModel, bench: Bench) -> None:
    ids = beginnings(bench)
    prefixes = begun(model, ids[:, :-1])
    assert torch.allclose(prefixes.extend(ids[:, -1]), model.hidden(ids)[:, -1], atol=1e-5)


def test_a_subset_leaves_the_others_as_they_are(model: PublicModel, bench: Bench) -> None:
    ids = beginnings(bench)
    prefixes = begun(model, ids)
    few = prefixes.subset(torch.tensor([2, 0]))
    states = few.alternatives(torch.tensor([[9], [9]]))
    assert torch.allclose(states, prefixes.alternatives(torch.full((3, 1), 9))[[2, 0]], atol=1e-6)
    assert prefixes.count == 3


def test_a_bottom_without_blocks_has_no_context(bench: Bench) -> None:
    bottom = bench.model(Cut(0, 1)).bottom
    prefixes = Prefixes(bottom, 1)
    before = prefixes.alternatives(torch.tensor([[9]]))
    prefixes.extend(torch.tensor([4]))
    assert torch.equal(before, prefixes.alternatives(torch.tensor([[9]])))
