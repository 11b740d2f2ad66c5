"""What the server saw of a sample of records, with the truth beside it for scoring alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.errors import DataError

NO_GUESS = -1  # stands in guesses where an attack does not name a token


@dataclass(frozen=True)
class Observed:
    """All releases of one record.

    ``token_ids`` (T,) is the truth and padded on the right; no attack reads it. ``length`` counts its real tokens:
    attacks assume that the server knows it. ``activations``: every release (T, R) of the bottom's output, behind clip,
    noise and codec; R is the model's width or the rank of a narrow release. ``gradients``: every release (T, D) at the
    trunk's output, each with the ``hidden`` states (T, D) that the trunk had returned. ``token_ids`` shifted by one
    are the labels.
    """

    token_ids: Tensor
    length: int
    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        time = len(self.token_ids)
        if not 0 < self.length <= time:
            raise DataError(f"a kept record of {time} tokens says that {self.length} are real", "Run it again.")
        if len(self.gradients) != len(self.hidden):
            raise DataError("a kept gradient lacks the hidden states it belongs to", "Run it again.")
        if not self.activations or any(len(item) != time for item in (*self.activations, *self.gradients)):
            raise DataError("kept releases do not fit their record", "Run it again.")


@dataclass(frozen=True)
class HeadUpdate:
    """The output head (V, D) before and after some steps as the server saw it; ``token_ids`` (N,) were its labels.

    ``sigma`` is the standard deviation of the noise that the update carried, in units of weights; 0 for none.
    """

    before: Tensor
    after: Tensor
    token_ids: Tensor
    sigma: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Records padded to one length: what the attacks compute on. Built by :func:`stack`."""

    released: Tensor  # (B, T, R): all activation releases of a record, averaged
    lengths: Tensor  # (B,)
    counts: Tensor  # (B,): how many releases were averaged
    gradients: tuple[tuple[Tensor, Tensor], ...]  # (hidden, gradient) pairs, each (B, T, D): one an epoch

    @property
    def mask(self) -> Tensor:
        """Which positions hold real tokens, (B, T)."""
        return torch.arange(self.released.shape[1]) < self.lengths[:, None]


def stack(observed: Sequence[Observed]) -> Sample:
    """Average each record's activations (noise falls by the root of their number), and pad to the longest record.

    Gradients are stacked release by release, as many as every record has.
    """
    time = max(len(record.token_ids) for record in observed)
    released = [torch.stack([item.float() for item in record.activations]).mean(0) for record in observed]
    return Sample(
        torch.stack([pad(item, time) for item in released]),
        torch.tensor([record.length for record in observed]),
        torch.tensor([len(record.activations) for record in observed]),
        tuple(
            (
                torch.stack([pad(record.hidden[number].float(), time) for record in observed]),
                torch.stack([pad(record.gradients[number].float(), time) for record in observed]),
            )
            for number in range(min(len(record.gradients) for record in observed))
        ),
    )


def pieces(tensor: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of at most ``size`` rows."""
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]


def pad(tensor: Tensor, time: int) -> Tensor:
    """(t, D) -> (time, D), zeros below."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, time - len(tensor)))


def truth(observed: Sequence[Observed]) -> list[Tensor]:
    """The real tokens of every record; for scoring alone."""
    return [record.token_ids[: record.length] for record in observed]
