"""Held-out loss of the weights that each round starts from, and what of it the next update tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from client_model.entry import records_of
from client_model.journal import Journal
from client_model.trainer import Trainer
from splitfl.codec.tensors import check_finite
from splitfl.config import Federation
from splitfl.data.packing import Batch
from splitfl.errors import PrivacyError
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.gate import Gate
from splitfl.split.loss import HeadLoss


class Measurements:
    """What was measured so far: ``losses`` by round, and ``shared``, which leaves with the next update."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Any]] = []
        self.shared: float | None = None

    def measure(
        self,
        trainer: Trainer,
        gate: Gate,
        journal: Journal,
        round_: int,
        batches: Sequence[Batch],
    ) -> HeadLoss:
        """Loss of the weights that ``round_`` starts from; shared if the federation asks for it, drawn once.

        Raises MissedStepError and NumericalError where it is no number.
        """
        settings = trainer.ends.settings
        last = round_ == settings.rounds.count
        each: list[float] | None = [] if settings.evaluation.share_metrics else None
        self.shared = None
        loss = trainer.evaluate(round_, batches, each)
        if each and not last:
            records = [record for batch in batches for record in records_of(batch)]
            self.shared = journal.once(f"metric {round_}", lambda: shared_metric(gate, round_, each, records))
        return loss

    def add(self, round_: int, loss: HeadLoss) -> dict[str, Any]:
        """Write a loss down; one of the same round or a later one belongs to a round that is done again.

        Raises NumericalError when it is no number.
        """
        check_finite(torch.tensor(loss.total), "the loss")
        self.losses = [entry for entry in self.losses if entry["round"] < round_]
        entry = {"round": round_, "loss": loss.mean, "tokens": loss.tokens}
        self.losses.append(entry)
        return {**entry, "perplexity": math.exp(min(50.0, loss.mean))}


def shared_metric(gate: Gate, round_: int, each: Sequence[float], records: Sequence[RecordRef]) -> float | None:
    """What the gate lets out of held-out losses; None where a round that is done again has no budget for it."""
    try:
        return gate.release_metric(round_, each, records)
    except PrivacyError:
        return None


def due(settings: Federation, round_: int) -> bool:
    """Whether the weights that ``round_`` starts from are to be measured."""
    every = settings.evaluation.every_rounds
    return round_ in (0, settings.rounds.count) or bool(every and round_ % every == 0)
