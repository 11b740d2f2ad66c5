"""What the attacker learns from public text before it looks at any release.

The states that the mechanism would show of it without noise; for each token of the vocabulary its mean state over
public contexts; how states move with their position, and how far they stray from that mean; and how common tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.errors import DataError
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import Prefixes, PublicModel
from splitfl.lab.audit.observed import pieces

CONTEXTS, CONTEXT_TOKENS = 6, 8  # public beginnings behind which every token of the vocabulary is tried
CHUNK = 256  # tokens of the vocabulary that are tried at once
HELD_OUT, HELD_OUT_TOKENS = 16, 2048  # at least; nothing is trained on them: for early stopping, to weigh evidence


@dataclass(frozen=True)
class Texts:
    """Records padded on the right: ids (N, T), lengths (N,)."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, records: Sequence[Tensor], time: int, pad_token_id: int) -> Texts:
        """Pad or cut records (t,) to ``time`` tokens; those of a single token are left out."""
        kept = [record[:time] for record in records if len(record) > 1]
        ids = torch.full((len(kept), time), pad_token_id)
        for row, record in zip(ids, kept, strict=True):
            row[: len(record)] = record
        return cls(ids, torch.tensor([len(record) for record in kept]))

    @property
    def mask(self) -> Tensor:
        """Which positions hold tokens, (N, T)."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    def __getitem__(self, rows: slice) -> Texts:
        return Texts(self.ids[rows], self.lengths[rows])


class Knowledge:
    """Public model, mechanism and public text, and what follows from them. ``time``: tokens of a padded record.

    The first records are held out; put them in random order beforehand. Raises DataError when there are too few to
    learn from.
    """

    def __init__(
        self,
        model: PublicModel,
        mechanism: Mechanism,
        records: Sequence[Tensor],
        time: int,
        pad_token_id: int = 0,
    ) -> None:
        texts = Texts.of(records, time, pad_token_id)
        if len(texts.ids) < 2 * HELD_OUT:
            raise DataError(
                f"{len(texts.ids)} public records are too few to train an attack on",
                f"Name public text of at least {2 * HELD_OUT} records.",
            )
        self.model, self.mechanism, self.pad_token_id = model, mechanism, pad_token_id
        aside = max(HELD_OUT, min(HELD_OUT_TOKENS // time, len(texts.ids) // 4))
        self.train, self.held_out = texts[aside:], texts[:aside]
        self.log_unigram = log_frequencies(self.train, model.vocab)  # (V,)
        encoded = mechanism.encode(model.hidden(self.train.ids))  # (N, T, R)
        scale = mechanism.scale(encoded)
        self.states = encoded * scale  # (N, T, R)
        self.record_scale = float(scale.mean()) if mechanism.clip == "record" else None
        self.bank = self._bank()  # (V, R)
        self.offsets, self.spread = self._residuals()  # (T, R), (R, R)

    def _bank(self) -> Tensor:
        """Each vocabulary token's mean clean state behind public beginnings, (V, R)."""
        contexts = self.train.ids[:CONTEXTS] if self.model.cut.n_bottom else self.train.ids[:1]
        prefixes = Prefixes(self.model.bottom, len(contexts))
        for tokens in contexts[:, : min(CONTEXT_TOKENS, contexts.shape[1] // 2)].T:
            prefixes.extend(tokens)
        vocabulary = pieces(torch.arange(self.model.vocab), CHUNK)
        states = [prefixes.alternatives(piece.expand(len(contexts), -1)) for piece in vocabulary]
        return self.clipped_alone(torch.cat(states, dim=1)).mean(0)

    def clipped_alone(self, hidden: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """Clean states of tokens whose record is not at hand, (..., D) -> (..., R).

        Where records are clipped as a whole, ``scale`` is the record's factor; public text's mean where it is None.
        """
        encoded = self.mechanism.encode(hidden)
        if self.record_scale is None:
            return encoded * self.mechanism.scale(encoded)
        return encoded * (self.record_scale if scale is None else scale)

    def _residuals(self) -> tuple[Tensor, Tensor]:
        """Mean deviation from the bank at each position, and the covariance of what is left."""
        mask = self.train.mask[..., None].float()  # (N, T, 1)
        away = (self.states - self.bank[self.train.ids]) * mask
        offsets = away.sum(0) / mask.sum(0).clamp_min(1.0)
        rest = ((away - offsets) * mask).flatten(0, 1)
        return offsets, rest.T @ rest / mask.sum()


def log_frequencies(texts: Texts, vocab: int) -> Tensor:
    """Log-frequencies of tokens, each counted half a time more than it was seen."""
    counts = torch.bincount(texts.ids[texts.mask], minlength=vocab).float() + 0.5
    return (counts / counts.sum()).log()
