"""English from Python's help topics, in tokens, and a bench to attack it on."""

from __future__ import annotations

import pytest
import torch

from splitfl.data.tokenizer import train_tokenizer
from splitfl.lab.audit.texts import public_records, public_texts

from .bench import TIME, VOCAB, Bench, Text


@pytest.fixture(scope="session")
def text() -> Text:
    topics = sorted(public_texts(None))[:40]
    tokenizer = train_tokenizer(topics, VOCAB)
    records = public_records(topics, tokenizer, TIME)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(3)).tolist()
    mixed = [records[index] for index in order]
    return Text(private=[*mixed[:5], mixed[5][: TIME // 2]], public=mixed[6:206], base=mixed[206:])


@pytest.fixture(scope="session")
def bench(text: Text) -> Bench:
    return Bench(text)
