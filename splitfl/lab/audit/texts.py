"""Public text for the attacker to learn from, as records of token ids."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitfl.data.readers import open_corpus
from splitfl.lab.audit.observed import pieces


def public_texts(path: Path | None) -> Iterator[str]:
    """Texts of a data file or folder; of Python's own help topics where none is named. Raises DataError."""
    if path is None:
        yield from pydoc_data.topics.topics.values()
    else:
        yield from (example.plain_text() for example in open_corpus(path))


def public_records(texts: Iterable[str], tokenizer: Any, length: int) -> list[Tensor]:
    """Token ids (t,) of each text, cut into records of at most ``length``; pieces of a single token are dropped."""
    records = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        records += [piece for piece in pieces(ids, length) if len(piece) > 1]
    return records
