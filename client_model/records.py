"""The client's data as it trains on it: train and held-out records from one file, and the batches of each step.

With privacy on, every record has a key (a keyed hash of its row), is padded to a public length, and takes part in a
step only while its budget allows.
"""

from __future__ import annotations

import hashlib
import hmac
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from splitfl.config import Federation
from splitfl.data.packing import Batch, DataOrder, RecordSet, collate
from splitfl.data.readers import open_corpus, split_corpus
from splitfl.data.records import Record
from splitfl.errors import CheckpointError, DataError, PrivacyError

Spend = Callable[[bytes, int, bool], bool]  # (key, padded length, trains) -> whether the record may take part
KEY_BYTES = 16


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
    train_keys: list[bytes] = field(default_factory=list)  # with privacy on, a record's name in the ledger
    held_out_keys: list[bytes] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, settings: Federation, tokenizer: Any, *, skip_bad: bool = False) -> ClientData:
        """Read ``path``. Raises DataError for a file that holds nothing to train on."""
        corpus = open_corpus(path, skip_bad=skip_bad)
        train, held_out = split_corpus(corpus, settings.evaluation.held_out_fraction, settings.evaluation.seed)
        batch = settings.batch
        return cls(
            settings,
            RecordSet(corpus, train, tokenizer, batch.max_length, settings.packs),
            RecordSet(corpus, held_out, tokenizer, batch.max_length, settings.packs) if len(held_out) else None,
            pad_token(tokenizer),
            len(corpus),
            corpus.skipped,
            corpus.fingerprint,
        )

    def check_fills_a_step(self) -> None:
        """Raise DataError when the records make no step: with privacy on, none takes part in a step twice."""
        records, needed = len(self.train), self.settings.batch.records
        if self.settings.privacy.on and records < needed:
            raise DataError(
                f"too few records to train on: {records}, and with privacy on a step takes {needed} different ones",
                "Give more rows; nothing computed from them has left.",
            )

    def order(self, name: str, cursor: tuple[int, int] = (0, 0)) -> DataOrder:
        """The seeded order of the training records of the client ``name``, from ``cursor``."""
        return DataOrder.at(len(self.train), data_seed(self.settings.seed, name), cursor)

    def name_records(self, secret: bytes) -> None:
        """Give every record its key: HMAC of the secret over its row, and which of several equal ones it is.

        Of the row and not of its tokens, for another tokenizer or length must not give a record a fresh budget.
        """
        seen: Counter[bytes] = Counter()
        self.train_keys = list(record_keys(self.train, secret, seen))
        self.held_out_keys = [] if self.held_out is None else list(record_keys(self.held_out, secret, seen))

    def pick(self, order: DataOrder, spend: Spend | None = None) -> list[int]:
        """Numbers of the next step's records.

        ``spend`` is asked for each record and leaves out those that must not take part. Raises PrivacyError when too
        few are left.
        """
        if spend is None:
            return list(map(int, order.take(self.settings.batch.records)))
        return self._affordable(order, spend)

    def step(self, order: DataOrder, spend: Spend | None = None) -> list[Batch]:
        """The micro-batches of the next step. Raises PrivacyError as ``pick``."""
        return self.micro_batches(self.pick(order, spend))

    def micro_batches(self, numbers: Sequence[int]) -> list[Batch]:
        """The micro-batches of a step with these records, each padded to its own longest record."""
        batch = self.settings.batch
        picked = [self.train[number] for number in numbers]
        keys = [self.train_keys[number] for number in numbers] if self.train_keys else []
        size = batch.records // batch.micro_batches
        starts = range(0, len(picked), size)
        return [self._collate(picked[at : at + size], keys[at : at + size]) for at in starts]

    def _affordable(self, order: DataOrder, spend: Spend) -> list[int]:
        """The next records that may take part; gives up once an epoch has passed without filling the step."""
        picked: list[int] = []
        for _ in range(self.settings.batch.records + len(self.train)):
            (number,) = map(int, order.take(1))
            if number in picked:
                continue  # an epoch ends within this step: twice in a step would be twice the sensitivity
            if spend(self.train_keys[number], self._padded(len(self.train[number])), True):
                picked.append(number)
                if len(picked) == self.settings.batch.records:
                    return picked
        left = len(set(picked))
        raise PrivacyError(
            f"the privacy budget of all but {left} of {len(self.train)} records is spent: too few for a step",
            "This client's part is over. More needs a new agreement; what is spent stays spent.",
        )

    def _padded(self, length: int) -> int:
        """The length that a record of ``length`` tokens is padded to, at least: public with privacy on."""
        if not self.settings.privacy.on:
            return length
        buckets = self.settings.batch.padded_lengths
        return buckets[bisect_left(buckets, length)]

    def _collate(self, records: Sequence[Record], keys: Sequence[bytes]) -> Batch:
        if not keys:
            return collate(records, None, self.pad_token_id)
        lengths = tuple(self._padded(len(record)) for record in records)
        batch = collate(records, max(lengths), self.pad_token_id)
        return replace(batch, keys=tuple(keys), padded_lengths=lengths)

    def evaluation(self, spend: Spend | None = None) -> list[Batch]:
        """The held-out batches that are measured: always the same ones, spread evenly, for files are often sorted."""
        if self.held_out is None:
            return []
        count = min(len(self.held_out), self.settings.evaluation.records)
        numbers = [number * len(self.held_out) // count for number in range(count)]
        if spend is not None:
            lengths = {number: self._padded(len(self.held_out[number])) for number in numbers}
            numbers = [n for n in numbers if spend(self.held_out_keys[n], lengths[n], False)]
        size = self.settings.batch.records // self.settings.batch.micro_batches
        pieces = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        keys = self.held_out_keys
        return [
            self._collate([self.held_out[n] for n in piece], [keys[n] for n in piece] if keys else [])
            for piece in pieces
        ]


def record_keys(records: RecordSet, secret: bytes, seen: Counter[bytes]) -> Iterator[bytes]:
    """Keys of records; ``seen`` counts equal ones, so that each has its own."""
    for index in range(len(records)):
        plain = hmac.new(secret, records.content(index), hashlib.sha256).digest()
        seen[plain] += 1
        yield hmac.new(secret, plain + seen[plain].to_bytes(8, "little"), hashlib.sha256).digest()[:KEY_BYTES]


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
