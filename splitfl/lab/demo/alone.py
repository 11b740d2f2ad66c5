"""What a client can do alone with the published model, its top alone trained: the leak of a federation must be earned.

*Ends-only*: bottom and top without the trunk; nothing is released. *Top-only*: trunk and release as in the federation,
but nobody merges. Both get that client's records, order, steps and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import torch

from client_model.ends import trainable
from client_model.records import ClientData
from splitfl.config import Federation
from splitfl.data.packing import Batch
from splitfl.lab.adapt import NarrowModel, Release, clip_tokens, public_release, train
from splitfl.lab.whole import local_steps
from splitfl.split.loss import HeadLoss
from splitfl.split.narrow import NarrowSpec, load_release

LossOf = Callable[[Batch], HeadLoss]
Say = Callable[[int, HeadLoss], None]  # step, and its loss


def open_narrow(folder: Path, settings: Federation, device: torch.device) -> NarrowModel:
    """A checkpoint with its release, of which the top alone trains. Raises CheckpointError."""
    model = NarrowModel(folder, settings, load_release(folder), device)
    for module in (model.bottom, model.trunk, model.narrow):
        module.requires_grad_(False)
    return model


def train_top(model: NarrowModel, loss_of: LossOf, data: ClientData, client: str, say: Say) -> None:
    """The client's steps of all rounds, on its schedule. Raises NumericalError."""
    settings, numbers = model.settings, count()

    def heard(batch: Batch) -> HeadLoss:
        loss = loss_of(batch)
        say(next(numbers), loss)
        return loss

    steps = settings.rounds.count * settings.rounds.local_steps
    train(heard, [trainable(model.top)], settings, islice(whole_steps(data, client), steps), lambda *_: None)


def whole_steps(data: ClientData, client: str) -> Iterator[Batch]:
    """The batches that ``client`` trains on in the federation, for ever. A step must be one micro-batch."""
    draw = local_steps(data, client)
    while True:
        (batch,) = draw()
        yield batch


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
    losses = [loss_of(batch) for batch in batches]
    return HeadLoss(sum(loss.total for loss in losses), sum(loss.tokens for loss in losses))
