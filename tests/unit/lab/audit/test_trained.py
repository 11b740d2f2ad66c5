"""What is known of attacks, again on a small model that was trained: the trunk and its prior mean something there."""

from __future__ import annotations

import pytest
import torch
from helpers import MemorySource
from transformers import PreTrainedModel

from splitfl.cut import Cut
from splitfl.lab.audit.enumeration import Search
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel
from splitfl.lab.audit.report import AuditReport
from splitfl.lab.audit.run import JOINT, LABELS, MLP, NEAREST, SEARCH, TRANSFORMER, Plan, run_audit
from splitfl.split.families import build_small_model, small_config

from .bench import TIME, VOCAB, Bench, Text, generator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def halves(text: Text) -> Text:
    """More records to attack than the quick tests have, so that intervals are narrow."""
    return Text(private=text.public[:24], public=text.public[24:], base=text.base)


@pytest.fixture(scope="module")
def trained(halves: Text) -> PreTrainedModel:
    """A llama of four blocks after 300 steps on records that neither side of the audit uses."""
    model = build_small_model(small_config("llama", layers=4, hidden=64, vocab=VOCAB, max_length=64, tie=False), 0)
    records = torch.stack([record for record in halves.base if len(record) == TIME])
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), generator(1)
    for _ in range(300):
        ids = records[torch.randint(len(records), (32,), generator=draw)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def audited(
    trained: PreTrainedModel,
    text: Text,
    cut: Cut,
    mechanism: Mechanism,
    releases: int = 1,
    gradients: Mechanism | None = None,
) -> AuditReport:
    model = PublicModel(MemorySource.of(trained), cut)
    return run_audit(
        Bench(text).observed(model, mechanism, releases=releases, gradients=gradients),
        model,
        mechanism,
        text.public,
        generator=generator(),
        gradient_mechanism=gradients,
        plan=Plan(seconds=60.0, steps=150, search=Search(widest=8)),
    )


def recoveries(report: AuditReport) -> dict[str, float]:
    return {row.name: row.recovery.value for row in report.attacks}


def test_embeddings_without_noise_are_read(trained: PreTrainedModel, halves: Text) -> None:
    assert recoveries(audited(trained, halves, Cut(0, 0), Mechanism("token", 0.1)))[NEAREST] >= 0.99


def test_a_frozen_block_without_noise_is_read_in_full(trained: PreTrainedModel, halves: Text) -> None:
    assert recoveries(audited(trained, halves, Cut(1, 1), Mechanism("token", 1.0)))[SEARCH] == 1.0


def test_ten_fresh_releases_average_back_what_one_hides(trained: PreTrainedModel, halves: Text) -> None:
    clip = 0.1
    mechanism = Mechanism("token", clip, sigma=0.4 * clip)
    once = recoveries(audited(trained, halves, Cut(0, 0), mechanism))
    often = recoveries(audited(trained, halves, Cut(0, 0), mechanism, releases=10))
    assert once[NEAREST] < 0.45
    assert often[NEAREST] >= 0.9


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5])
def test_no_attack_is_weaker_than_a_simpler_one(trained: PreTrainedModel, halves: Text, sigma: float) -> None:
    report = audited(trained, halves, Cut(1, 1), Mechanism("token", 1.0, sigma=sigma))
    assert set(recoveries(report)) == {NEAREST, MLP, TRANSFORMER, SEARCH}
    assert report.outdone == []


def test_open_gradients_undo_the_noise_on_activations(trained: PreTrainedModel, halves: Text) -> None:
    noisy, open_ = Mechanism("token", 1.0, sigma=0.5), Mechanism("record", float("inf"))
    found = recoveries(audited(trained, halves, Cut(1, 0), noisy, gradients=open_))
    firsts = len(halves.private) / sum(len(record) for record in halves.private)
    assert found[LABELS] >= 0.98 * (1 - firsts)
    assert max(found[JOINT], found[SEARCH]) >= found[LABELS]
