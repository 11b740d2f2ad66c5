"""The client's data as it trains on it: train and held-out records from one file, and the batches of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from splitfl.config import Federation
from splitfl.data.packing import Batch, DataOrder, RecordSet, collate
from splitfl.data.readers import open_corpus, split_corpus
from splitfl.errors import CheckpointError


@dataclass
class ClientData:
    """Records to train on and records to measure with; neither is ever both."""

    settings: Federation
    train: RecordSet
    held_out: RecordSet | None
    pad_token_id: int
    rows: int
    skipped: int  # rows that could not be read, beside those
    fingerprint: str  # tells whether the file is still the same

    @classmethod
    def open(cls, path: Path, settings: Federation, tokenizer: Any, *, skip_bad: bool = False) -> ClientData:
        """Read ``path``. Raises DataError for a file that holds nothing to train on."""
        corpus = open_corpus(path, skip_bad=skip_bad)
        train, held_out = split_corpus(corpus, settings.evaluation.held_out_fraction, settings.evaluation.seed)
        batch = settings.batch
        return cls(
            settings,
            RecordSet(corpus, train, tokenizer, batch.max_length, batch.pack),
            RecordSet(corpus, held_out, tokenizer, batch.max_length, batch.pack) if len(held_out) else None,
            pad_token(tokenizer),
            len(corpus),
            corpus.skipped,
            corpus.fingerprint,
        )

    def order(self, name: str, cursor: tuple[int, int] = (0, 0)) -> DataOrder:
        """The seeded order of the training records of the client ``name``, from ``cursor``."""
        return DataOrder.at(len(self.train), data_seed(self.settings.seed, name), cursor)

    def step(self, order: DataOrder) -> list[Batch]:
        """The micro-batches of the next step, each padded to the longest record of the step."""
        batch = self.settings.batch
        picked = [self.train[int(index)] for index in order.take(batch.records)]
        size = batch.records // batch.micro_batches
        longest = max(len(record) for record in picked)
        pieces = [picked[start : start + size] for start in range(0, len(picked), size)]
        return [collate(piece, longest, self.pad_token_id) for piece in pieces]

    def evaluation(self) -> list[Batch]:
        """The held-out batches that are measured: always the same ones, spread evenly, for files are often sorted."""
        if self.held_out is None:
            return []
        count = min(len(self.held_out), self.settings.evaluation.records)
        picked = [self.held_out[number * len(self.held_out) // count] for number in range(count)]
        return batches(picked, self.settings, self.pad_token_id)


def batches(records: Sequence[Any], settings: Federation, pad_token_id: int) -> list[Batch]:
    """Records in order, as batches of the size of a micro-batch."""
    size = settings.batch.records // settings.batch.micro_batches
    pieces = [records[start : start + size] for start in range(0, len(records), size)]
    return [collate(piece, None, pad_token_id) for piece in pieces]


def data_seed(seed: int, name: str) -> int:
    """Each client's own order, from the federation's seed and the client's name."""
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises CheckpointError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be read", "Save one beside the model.") from error


def pad_token(tokenizer: Any) -> int:
    """The id that fills the right of short rows; it is masked, so any id will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
