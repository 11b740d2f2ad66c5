"""Exposure: high for what a model was made to remember, low for what it never saw."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import MemorySource, tiny_model

from splitfl.errors import DataError
from splitfl.lab.audit.canaries import canary_exposure, texts_like
from splitfl.lab.audit.model import frozen
from splitfl.split.segment import Piece

from .bench import VOCAB, generator


def test_a_remembered_canary_is_exposed_and_a_strange_one_is_not() -> None:
    model = tiny_model("llama", layers=2, vocab=VOCAB)
    draw = generator(1)
    sequences = [torch.randint(2, VOCAB, (8,), generator=draw) for _ in range(140)]
    planted, never, candidates = sequences[:2], sequences[2:12], sequences[12:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = model(input_ids=torch.stack(planted), labels=torch.stack(planted)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = frozen(MemorySource.of(model), Piece(0, 2, embedding=True, head=True))
    assert canary_exposure(whole, planted, candidates) == [math.log2(129)] * 2
    assert sum(canary_exposure(whole, never, candidates)) / 10 < 3.5
    with pytest.raises(ValueError, match="candidates"):
        canary_exposure(whole, planted, [])


def test_candidates_differ_from_a_canary_in_its_digits_alone() -> None:
    texts = texts_like("room 12, code 9", 50, generator())
    assert len(set(texts)) > 40
    assert all(text[:5] == "room " and text[7:14] == ", code " for text in texts)
    assert all(text[5:7].isdecimal() and text[14:].isdecimal() for text in texts)


def test_a_canary_without_digits_is_refused() -> None:
    with pytest.raises(DataError, match="no digits"):
        texts_like("nothing to vary", 5, generator())
