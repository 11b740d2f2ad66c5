"""From rows to what the trainer takes: records, padded batches of them, and the order in which they come.

Packed, rows are laid end to end and cut into blocks of ``max_length`` tokens: no token is wasted on padding,
but a record then holds several rows and attention reaches across them, so it is not for use with privacy on,
where a record is the unit of privacy. Padded, a row is a record. Either way the tokens are not kept: the
index says which rows a record needs, and they are read and tokenised again when it is asked for.

The data order is a function of (seed, epoch) and its cursor two integers, so that a restart goes on where the
run stopped. No global random state is read or written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from splitfl.data.readers import Corpus
from splitfl.data.records import IGNORE, Encoded, IntArray, Record, encode_example
from splitfl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_TOKENS = 1 << 20


class RecordSet(Sequence[Record]):
    """The records of some rows of a corpus, made when asked for.

    Making the set tokenises every row once, to count. ``truncated`` is how many rows were cut on the right to
    ``max_length`` tokens (padded sets), ``parted`` how many rows with a prompt lie across blocks, so that part of
    the answer is learned without it (packed sets), ``unlabelled`` how many records were dropped since no token of
    theirs carries loss. Raises ``ConfigError`` for ``max_length`` below 2, ``DataError`` when no record is left or
    a row cannot be encoded (see ``encode_example``).
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: Sequence[int] | IntArray,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        pack: bool,
    ) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}", "It must be at least 2")
        self.max_length = max_length
        self.pack = pack
        self.truncated = 0
        self.parted = 0
        self.unlabelled = 0
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._rows = np.asarray(rows, np.int64)
        self._cache = _TokenCache(_CACHED_TOKENS)
        self._ends = np.zeros(len(self._rows) + 1, np.int64)  # tokens up to each row, (rows + 1,)
        # From record to block of tokens, or to position in rows.
        self._kept = self._index_blocks() if pack else self._index_rows()
        if not len(self._kept):
            raise DataError(
                f"None of the {len(self._rows)} rows gives a record with a token to learn",
                "Give more rows, or a larger max_length if prompts fill it",
            )

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Read and tokenise the rows of one record, or of a slice. Raises ``IndexError`` and ``DataError``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        which = int(self._kept[index])
        return Record.from_encoded(self._block(which) if self.pack else self._encode(which, self.max_length))

    def content(self, index: int) -> bytes:
        """What a record was made of, as canonical bytes: its row, whole, whatever the tokenizer and the length.

        Raises ``ConfigError`` for a packed set, whose records are no rows.
        """
        if self.pack:
            raise ConfigError("packed records are no rows", "Set batch.pack = false.")
        return self._corpus[int(self._rows[int(self._kept[index])])].content()

    def _index_rows(self) -> IntArray:
        kept = np.zeros(len(self._rows), np.bool_)
        for position, encoded in self._encoded_rows():
            self.truncated += len(encoded.ids) > self.max_length
            kept[position] = encoded.loss_mask[1 : self.max_length].any()
        self.unlabelled = int(np.count_nonzero(~kept))
        return np.flatnonzero(kept)

    def _index_blocks(self) -> IntArray:
        labelled: list[IntArray] = [np.zeros(0, np.int64)]
        for position, encoded in self._encoded_rows():
            first, last = self._ends[position], self._ends[position + 1] - 1
            parted = first // self.max_length != last // self.max_length
            self.parted += bool(parted and not encoded.loss_mask.all())
            tokens = np.flatnonzero(encoded.loss_mask) + self._ends[position]
            # The first token of a block has none before it in the block that could predict it.
            labelled.append(np.unique(tokens[tokens % self.max_length > 0] // self.max_length))
        whole, tail = divmod(int(self._ends[-1]), self.max_length)
        kept = np.unique(np.concatenate(labelled))
        self.unlabelled = whole + (tail >= 2) - len(kept)
        return kept

    def _encoded_rows(self) -> Iterator[tuple[int, Encoded]]:
        for position in range(len(self._rows)):
            encoded = self._encode(position)
            self._ends[position + 1] = self._ends[position] + len(encoded.ids)
            yield position, encoded

    def _block(self, block: int) -> Encoded:
        """Tokens [start, end) of all rows laid end to end."""
        start = block * self.max_length
        end = min(start + self.max_length, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, end, side="left"))
        parts = [self._part(position, start, end) for position in range(first, last)]
        return Encoded(np.concatenate([p.ids for p in parts]), np.concatenate([p.loss_mask for p in parts]))

    def _part(self, position: int, start: int, end: int) -> Encoded:
        encoded = self._cache.get(position) or self._cache.put(position, self._encode(position))
        window = slice(max(start - int(self._ends[position]), 0), end - int(self._ends[position]))
        return Encoded(encoded.ids[window], encoded.loss_mask[window])

    def _encode(self, position: int, max_length: int | None = None) -> Encoded:
        row = int(self._rows[position])
        example = self._corpus[row]
        try:
            return encode_example(example, self._tokenizer, max_length)
        except DataError as error:
            raise DataError(f"{self._corpus.place(row)}: {error.message}", error.remedy) from error


class _TokenCache:
    """The rows tokenised last, up to a number of tokens: neighbouring blocks share rows, long ones above all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._rows: OrderedDict[int, Encoded] = OrderedDict()

    def get(self, position: int) -> Encoded | None:
        if position in self._rows:
            self._rows.move_to_end(position)
        return self._rows.get(position)

    def put(self, position: int, encoded: Encoded) -> Encoded:
        self._rows[position] = encoded
        self._size += len(encoded.ids)
        while self._size > self._limit and len(self._rows) > 1:
            self._size -= len(self._rows.popitem(last=False)[1].ids)
        return encoded


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Records padded on the right: ``input_ids`` and ``labels`` int64 (B, T), ``lengths`` int64 (B,).

    With privacy on each record has its ``keys`` entry (a keyed hash) and its public ``padded_lengths`` one; true
    lengths stay here.
    """

    input_ids: IntArray
    labels: IntArray
    lengths: IntArray
    keys: tuple[bytes, ...] = ()
    padded_lengths: tuple[int, ...] = ()

    @property
    def label_tokens(self) -> int:
        """How many positions of the batch carry loss: what a mean loss is divided by."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def told_tokens(self) -> int:
        """What the trunk is told instead, to divide by: with privacy on it is public, padding and all."""
        return sum(self.padded_lengths) if self.padded_lengths else self.label_tokens

    def __repr__(self) -> str:
        return f"Batch({self.input_ids.shape[0]} x {self.input_ids.shape[1]}, {self.label_tokens} with loss)"


def collate(records: Sequence[Record], pad_to: int | None, pad_token_id: int) -> Batch:
    """Pad records on the right, to ``pad_to`` tokens or to the longest; padding carries no loss.

    Raises ``ValueError`` for no records, or one longer than ``pad_to``.
    """
    if not records:
        raise ValueError("no records to collate")
    lengths = np.array([len(record) for record in records], np.int64)  # (B,)
    width = int(lengths.max()) if pad_to is None else pad_to
    if lengths.max() > width:
        raise ValueError(f"a record of {lengths.max()} tokens does not fit pad_to={width}")
    input_ids = np.full((len(records), width), pad_token_id, np.int64)  # (B, T)
    labels = np.full((len(records), width), IGNORE, np.int64)  # (B, T)
    for row, record in enumerate(records):
        input_ids[row, : len(record)] = record.input_ids
        labels[row, : len(record)] = record.labels
    return Batch(input_ids, labels, lengths)


class DataOrder:
    """An endless order over ``n`` records: a fresh permutation each epoch, drawn from (seed, epoch) alone.

    Raises ``ValueError`` for ``n`` below 1 or a negative seed.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1 or seed < 0:
            raise ValueError(f"an order needs n >= 1 and seed >= 0, not n={n}, seed={seed}")
        self.n = n
        self.seed = seed
        self._epoch = 0
        self._position = 0
        self._permutation = self._draw(0)

    @classmethod
    def at(cls, n: int, seed: int, cursor: tuple[int, int]) -> DataOrder:
        """The order as it stood at ``cursor``. Raises ``DataError`` for a cursor that does not fit ``n`` records."""
        epoch, position = cursor
        if epoch < 0 or not 0 <= position < n:
            raise DataError(
                f"The data order stopped at record {position} of epoch {epoch}, but there are {n} records now",
                "Put back the data that the run was started with, or start a new run",
            )
        order = cls(n, seed)
        order._epoch, order._position, order._permutation = epoch, position, order._draw(epoch)
        return order

    @property
    def cursor(self) -> tuple[int, int]:
        """(epoch, position in it) of the next index; position < n. With ``at`` it restores the order."""
        return self._epoch, self._position

    def take(self, k: int) -> IntArray:
        """The next ``k`` indices, int64 (k,), running on into the next epoch where this one ends."""
        if k < 0:
            raise ValueError(f"cannot take {k} records")
        taken = [np.zeros(0, np.int64)]
        while k > 0:
            part = self._permutation[self._position : self._position + k]
            taken.append(part)
            k -= len(part)
            self._advance(len(part))
        return np.concatenate(taken)

    def _advance(self, count: int) -> None:
        self._position += count
        if self._position == self.n:
            self._epoch, self._position = self._epoch + 1, 0
            self._permutation = self._draw(self._epoch)

    def _draw(self, epoch: int) -> IntArray:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.n)
