"""The learned inverter: never weaker than what it starts from, better after training, and reproducible."""

from __future__ import annotations

import time

import pytest
import torch

from splitfl.cut import Cut
from splitfl.lab.audit.inverter import (
    HeldOut,
    Inverter,
    Training,
    linear_discriminant,
    read,
    seeded,
    train_inverter,
    two_stages,
)
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import stack
from splitfl.lab.audit.public import Knowledge

from .bench import Bench, generator, share

NOISY = Mechanism("token", 0.1, sigma=0.025)


@pytest.fixture(scope="module")
def knowledge(bench: Bench) -> Knowledge:
    return bench.knowledge(Cut(1, 0), NOISY)


def fresh(knowledge: Knowledge) -> Inverter:
    with seeded(generator()):
        return Inverter(knowledge, NOISY.sigma, width=32, layers=1)


def test_an_untrained_inverter_is_the_linear_discriminant(knowledge: Knowledge) -> None:
    inverter = fresh(knowledge)
    released, mask = knowledge.states[:4], knowledge.train.mask[:4]
    weight, bias = linear_discriminant(knowledge, NOISY.sigma)
    linear = (released - knowledge.offsets) @ weight.T + bias
    for stage in (False, True):
        inverter.reads_context = stage
        assert torch.allclose(read(inverter, released, mask)[mask], linear.log_softmax(-1)[mask], atol=1e-4)


def test_training_lowers_the_loss_on_held_out_text(knowledge: Knowledge) -> None:
    inverter, probe = fresh(knowledge), HeldOut(knowledge, NOISY, generator(1))
    inverter.reads_context = True
    before = probe.loss(inverter)
    after = train_inverter(inverter, knowledge, probe, Training(steps=120, tokens=512), generator(2))
    assert after < before - 0.05
    assert probe.loss(inverter) == pytest.approx(after)


def test_training_that_only_hurts_leaves_the_inverter_as_it_was(
    knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfl.lab.audit.inverter.RATE", 10.0)
    inverter, probe = fresh(knowledge), HeldOut(knowledge, NOISY, generator(1))
    before = probe.loss(inverter)
    assert train_inverter(inverter, knowledge, probe, Training(steps=60, tokens=256), generator(2)) <= before
    assert probe.loss(inverter) <= before


def test_training_ends_when_its_time_is_over(knowledge: Knowledge) -> None:
    inverter, probe = fresh(knowledge), HeldOut(knowledge, NOISY, generator(1))
    train_inverter(inverter, knowledge, probe, Training(steps=10**9, deadline=time.monotonic()), generator(2))
    assert probe.loss(inverter) == pytest.approx(probe.loss(fresh(knowledge)))


def test_both_stages_read_more_than_chance_and_come_again(bench: Bench, knowledge: Knowledge) -> None:
    observed = bench.observed(knowledge.model, NOISY)
    sample = stack(observed)

    def run() -> dict[str, float]:
        stages = two_stages(knowledge, NOISY, (Training(steps=20),) * 2, generator(4), lambda _: None)
        return {name: share(read(net, sample.released, sample.mask).argmax(-1), observed) for name, net in stages}

    found = run()
    assert list(found) == ["mlp", "transformer"]
    assert min(found.values()) > 0.2
    assert run() == found


def test_building_a_network_leaves_the_global_generator_alone(knowledge: Knowledge) -> None:
    before = torch.get_rng_state()
    fresh(knowledge)
    assert torch.equal(before, torch.get_rng_state())
