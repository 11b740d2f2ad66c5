"""What can be had from the published model without a federation's leak, which must be earned. Tops alone train.

*Ends-only*: bottom and top without the trunk; nothing is released. *Top-only*: trunk and release as in the federation,
but nobody merges. *Ends-only, merged*: tops are averaged after every round, and that is all that leaves. Each client
gets its records, order, steps and schedule of the federation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from client_model.records import ClientData
from splitfl.config import Federation
from splitfl.data.packing import Batch
from splitfl.federation.robust import Contribution, token_mean
from splitfl.federation.schedule import learning_rate
from splitfl.lab.adapt import NarrowModel, Release, constantly, public_release
from splitfl.lab.whole import local_steps
from splitfl.privacy.mechanism import clip_tokens
from splitfl.split.loss import HeadLoss
from splitfl.split.modes import optimizer_spec
from splitfl.split.narrow import NarrowSpec, load_release
from splitfl.split.optimizer import PartOptimizer

LossOf = Callable[[Batch], HeadLoss]
Say = Callable[[int, HeadLoss], None]  # step, and its loss


def open_narrow(folder: Path, settings: Federation, device: torch.device) -> NarrowModel:
    """A checkpoint with its release, of which the top alone trains. Raises CheckpointError."""
    model = NarrowModel(folder, settings, load_release(folder), device)
    for module in (model.bottom, model.trunk, model.narrow):
        module.requires_grad_(False)
    return model


class TopTrainer:
    """Trains a model's top as ``client`` does in the federation; ``say`` hears of every step."""

    def __init__(self, model: NarrowModel, loss_of: LossOf, data: ClientData, client: str, say: Say) -> None:
        self.settings, self.loss_of, self.say = model.settings, loss_of, say
        self.optimizer = PartOptimizer(model.top.trainable(), optimizer_spec(model.settings))
        self.draw = local_steps(data, client)

    def train_round(self, round_: int) -> int:
        """One round's steps; returns the label tokens they saw."""
        seen, length = 0, self.settings.rounds.local_steps
        for step in range(length):
            losses = [self.loss_of(batch) for batch in self.draw()]
            loss = total(losses)
            self.optimizer.step(learning_rate(self.settings, round_, step), constantly(loss.tokens))
            self.say(round_ * length + step, loss)
            seen += loss.tokens
        return seen


def train_together(trainers: Sequence[TopTrainer]) -> None:
    """All rounds; after each, the tops become their average."""
    for round_ in range(trainers[0].settings.rounds.count):
        tokens = [trainer.train_round(round_) for trainer in trainers]
        merge_tops([trainer.optimizer.named for trainer in trainers], tokens)


@torch.no_grad()
def merge_tops(tops: Sequence[dict[str, torch.nn.Parameter]], tokens: Sequence[int]) -> None:
    """Overwrite each weight of all tops with its average over them."""
    for name in tops[0]:
        parts = [Contribution(top[name].cpu(), seen) for top, seen in zip(tops, tokens, strict=True)]
        merged = token_mean(parts)
        for top in tops:
            top[name].copy_(merged)


def through_noise(model: NarrowModel, seed: int) -> LossOf:
    """Loss through the release, with fresh noise at every call."""
    release = public_release(model.narrow.spec, torch.Generator().manual_seed(seed))
    return lambda batch: model.loss(batch, release)


def released_once(model: NarrowModel) -> LossOf:
    """Loss through the release, each record's noise drawn once. Batches must have keys."""
    length = model.settings.batch.max_length
    return lambda batch: model.loss(batch, release_of(batch, model.narrow.spec, length))


def release_of(batch: Batch, spec: NarrowSpec, length: int) -> Release:
    """Noise that follows from a record's key: it comes again with the record, as bytes do that were sent once."""

    def noise(key: bytes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        return torch.randn(length, spec.rank, generator=generator)

    drawn = spec.sigma * torch.stack([noise(key) for key in batch.keys])  # (B, length, r)
    return lambda encoded: clip_tokens(encoded, spec.clip_norm) + drawn[:, : encoded.shape[1]].to(encoded.device)


@torch.no_grad()
def measure(loss_of: LossOf, batches: Iterable[Batch]) -> HeadLoss:
    """Summed loss without training."""
    return total([loss_of(batch) for batch in batches])


def total(losses: Sequence[HeadLoss]) -> HeadLoss:
    """Losses and tokens added up."""
    return HeadLoss(sum(loss.total for loss in losses), sum(loss.tokens for loss in losses))
