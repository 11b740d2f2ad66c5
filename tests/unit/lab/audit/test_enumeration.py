"""Causal enumeration: exact at a frozen public bottom without noise, however short the shortlist; time is kept."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from splitfl.cut import Cut
from splitfl.lab.audit.enumeration import Search, choose_weights, enumerate_tokens, make_target, starting_weights
from splitfl.lab.audit.evidence import collect, fit_weights, rehearse
from splitfl.lab.audit.inverter import Inverter, read, seeded
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.nearest import nearest_tokens
from splitfl.lab.audit.observed import Observed, stack
from splitfl.lab.audit.public import Knowledge

from .bench import Bench, generator, share

NEVER = float("inf")


def untrained(knowledge: Knowledge, sigma: float) -> Inverter:
    with seeded(generator()):
        return Inverter(knowledge, sigma, width=16, layers=1)


def decoded(knowledge: Knowledge, observed: list[Observed], search: Search, deadline: float = NEVER) -> Tensor:
    sample, mechanism = stack(observed), knowledge.mechanism
    evidence = collect(knowledge.model, untrained(knowledge, mechanism.sigma), sample.released, sample.mask, (), None)
    target = make_target(knowledge, mechanism, sample.released, sample.mask, evidence)
    return enumerate_tokens(knowledge, mechanism, target, starting_weights(target), search, deadline)


@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism("token", 0.1),
        Mechanism("record", 1.0),
        Mechanism("token", float("inf")),
        Mechanism("token", 0.1, codec="bf16"),
    ],
    ids=["token", "record", "open", "bf16"],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_enumeration_is_exact_at_a_frozen_bottom_without_noise(bench: Bench, mechanism: Mechanism, depth: int) -> None:
    knowledge = bench.knowledge(Cut(depth, 0), mechanism)
    observed = bench.observed(knowledge.model, mechanism)
    assert share(decoded(knowledge, observed, Search(width=2)), observed) == 1.0


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_enumeration_is_exact_for_other_families(bench: Bench, family: str) -> None:
    bench = Bench(bench.text, family)
    mechanism = Mechanism("token", 0.1)
    knowledge = bench.knowledge(Cut(1, 1), mechanism)
    observed = bench.observed(knowledge.model, mechanism)
    assert share(decoded(knowledge, observed, Search(width=2)), observed) == 1.0


def test_the_whole_vocabulary_is_tried_where_the_shortlist_does_not_explain(bench: Bench) -> None:
    mechanism = Mechanism("token", 0.1)
    knowledge = bench.knowledge(Cut(2, 0), mechanism)
    observed = bench.observed(knowledge.model, mechanism)
    assert share(nearest_tokens(knowledge, stack(observed).released), observed) < 1.0
    assert share(decoded(knowledge, observed, Search(width=1, shortlist=1)), observed) == 1.0


def test_enumeration_reads_more_than_the_discriminant_through_noise(bench: Bench) -> None:
    mechanism = Mechanism("token", 0.1, sigma=0.025)
    knowledge = bench.knowledge(Cut(2, 0), mechanism)
    observed = bench.observed(knowledge.model, mechanism)
    sample = stack(observed)
    linear = read(untrained(knowledge, mechanism.sigma), sample.released, sample.mask).argmax(-1)
    assert share(decoded(knowledge, observed, Search(widest=8)), observed) > share(linear, observed)


def test_enumeration_stops_when_its_time_is_over(bench: Bench) -> None:
    mechanism = Mechanism("token", 0.1)
    knowledge = bench.knowledge(Cut(0, 0), mechanism)
    observed = bench.observed(knowledge.model, mechanism) * 2  # two groups
    assert len(decoded(knowledge, observed, Search(width=1), deadline=time.monotonic())) == 8


def test_weights_are_tried_on_public_text(bench: Bench) -> None:
    mechanism = Mechanism("token", 0.1, sigma=0.025)
    knowledge = bench.knowledge(Cut(1, 0), mechanism)
    texts = knowledge.held_out[:4]
    released, gradients = rehearse(knowledge, texts, mechanism, None, 0, generator())
    evidence = collect(knowledge.model, untrained(knowledge, 0.025), released, texts.mask, gradients, None)
    target = make_target(knowledge, mechanism, released, texts.mask, evidence)
    weights = choose_weights(knowledge, mechanism, target, texts.ids, texts.mask, torch.ones(1))
    assert weights.shape == (3,)
    assert float(weights[0]) > 0.2


def test_a_record_clip_is_estimated_from_a_first_reading(bench: Bench) -> None:
    mechanism = Mechanism("record", 1.0, sigma=0.01)
    knowledge = bench.knowledge(Cut(1, 0), mechanism)
    observed = bench.observed(knowledge.model, mechanism)
    sample = stack(observed)
    evidence = collect(knowledge.model, untrained(knowledge, 0.01), sample.released, sample.mask, (), None)
    target = make_target(knowledge, mechanism, sample.released, sample.mask, evidence)
    assert target.scale is not None
    exact = mechanism.scale(knowledge.model.hidden(torch.stack([record.token_ids for record in observed])))
    assert torch.allclose(target.scale, exact, rtol=0.1)


def test_evidence_that_says_nothing_gets_no_weight() -> None:
    answers = torch.randint(10, (400,), generator=generator())
    telling = 2.0 * torch.nn.functional.one_hot(answers, 10) + torch.randn(400, 10, generator=generator(1))
    idle = 3 * torch.randn(400, 10, generator=generator(2))
    weights = fit_weights(torch.stack([telling, idle], dim=-1), answers)
    assert float(weights[0]) > 1.0
    assert float(weights[1]) < 0.2
