"""What the publisher of a narrow release does: learn encoder, decoder, trunk, mixing and top on public text, noise on.

Two stages. The ends alone first: a small model that releases nothing, quick to train, and the best that a client has
without a server. Then the bottom is frozen and the trunk joins through the noise, from a mixing weight of zero: what it
adds is gain over the ends. Clients start from a model that expects noised vectors.

No private text is involved, so nothing here is a release and the noise may come from an ordinary generator. The result
is a checkpoint that opens anywhere, with ``release.safetensors`` beside it; without the release it is a worse language
model than before: its trunk has learned to read noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from client_model.records import batches, open_tokenizer, pad_token
from client_model.trainer import on_device
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch, DataOrder, RecordSet, collate
from splitfl.data.readers import open_corpus
from splitfl.data.records import Record
from splitfl.errors import ConfigError, NumericalError
from splitfl.federation.schedule import learning_rate
from splitfl.privacy.mechanism import clip_tokens
from splitfl.split.checkpoint import CheckpointFolder, load_segment
from splitfl.split.export import TrainedWeights, check_free, export_checkpoint
from splitfl.split.loss import HeadLoss, head_loss
from splitfl.split.modes import arithmetic, optimizer_spec, training_policy
from splitfl.split.narrow import NarrowRelease, NarrowSpec, save_release
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.segment import Piece
from splitfl.split.shares import ends_pieces
from splitfl.split.training import set_up_training

CARD = """Adapted by `splitfl adapt` to a narrow, noised release: the blocks of the trunk have learned to read what
`release.safetensors` encodes and decodes. Without it this checkpoint is not a good language model.
"""
SAMPLE = 64  # public records from which encoder and decoder start
Records = Sequence[Record]
Report = Callable[[int, float], None]  # step, and its loss in nats per token
Release = Callable[[Tensor], Tensor]  # encoded vectors (B, T, r) -> what the server sees of them, (B, T, r)


@dataclass(frozen=True)
class Adaptation:
    """How a publisher adapts. ``records`` of ``max_length`` tokens make a step; ``learning_rate`` is AdamW's peak.

    ``ends_steps`` come before ``steps``, and cost a good deal less: the trunk does not run.
    """

    cut: Cut
    rank: int = 16
    noise_multiplier: float = 0.5
    ends_steps: int = 1000
    steps: int = 1000
    records: int = 16
    max_length: int = 128
    learning_rate: float = 1e-3
    compute: str = "auto"
    seed: int = 0

    def settings(self) -> Federation:
        """The same as a federation's settings, whose schedule, optimizer and arithmetic are used."""
        return parse_federation(
            {
                "seed": self.seed,
                "rounds": {"count": 1, "local_steps": self.steps},
                "batch": {"records": self.records, "max_length": self.max_length, "pack": True},
                "model": {"n_bottom": self.cut.n_bottom, "n_top": self.cut.n_top, "compute": self.compute},
                "optimizer": {"learning_rate": self.learning_rate, "warmup_steps": min(20, self.steps // 2)},
            },
            "the adaptation",
        )


class NarrowModel:
    """A checkpoint cut in three with a narrow release between, all in one process."""

    def __init__(self, folder: Path, settings: Federation, narrow: NarrowRelease, device: torch.device) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        source = CheckpointFolder(folder)
        layers: int = source.config.num_hidden_layers
        trunk = settings.cut.trunk(layers)
        if not len(trunk):
            raise ConfigError(f"cut {settings.cut} leaves no trunk, so nothing is released", "Keep fewer blocks.")
        bottom, top = ends_pieces(settings.cut, layers)
        pieces = (bottom, Piece(trunk.start, trunk.stop), top)
        self.bottom, self.trunk, self.top = segments = [load_segment(source, piece) for piece in pieces]
        policy = replace(training_policy(settings, layers, device), freeze_below=0)
        for segment in segments:
            set_up_training(segment, policy)
            segment.to(device)
        self.narrow = narrow.to(device).requires_grad_(True)

    def segments(self) -> dict[str, nn.Parameter]:
        """All weights of the three segments by global name."""
        return {**self.bottom.trainable(), **self.trunk.trainable(), **self.top.trainable()}

    @property
    def bottom_parts(self) -> list[dict[str, nn.Parameter]]:
        """What the ends alone train."""
        return [self.bottom.trainable(), self.top.trainable(), dict(self.narrow.skip.own.named_parameters())]

    @property
    def joint_parts(self) -> list[dict[str, nn.Parameter]]:
        """What trains once the bottom is frozen: server's and client's blocks, and the modules of the release."""
        return [self.trunk.trainable(), self.top.trainable(), dict(self.narrow.named_parameters())]

    @torch.no_grad()
    def run_bottom(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids (B, T) -> clean hidden states (B, T, D); nothing flows back."""
        return self._run_bottom(input_ids, lengths)

    def _run_bottom(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        with arithmetic(self.settings, self.device):
            hidden: Tensor = self.bottom(self.bottom.embed(input_ids), lengths)
        return hidden.float()

    def encode(self, hidden: Tensor) -> Tensor:
        """Clean hidden states (B, T, D) -> what the release is given, (B, T, r), always in fp32."""
        encoded: Tensor = self.narrow.encoder(hidden)
        return encoded.float()

    def run_trunk(self, released: Tensor, lengths: Tensor | None) -> Tensor:
        """What the server makes of a release: (B, T, r) -> (B, T, D)."""
        with arithmetic(self.settings, self.device):
            states: Tensor = self.trunk(self.narrow.decoder(released).float(), lengths)
        return states

    def run_top(self, own: Tensor, from_trunk: Tensor, lengths: Tensor | None, labels: Tensor) -> HeadLoss:
        """Both states (B, T, D) -> summed loss; backward too where gradients are on."""
        with arithmetic(self.settings, self.device):
            mixed = self.narrow.skip(own, from_trunk).float()
        return self.top_loss(mixed, lengths, labels)

    def top_loss(self, hidden: Tensor, lengths: Tensor | None, labels: Tensor) -> HeadLoss:
        """What enters the top (B, T, D) -> summed loss; backward too where gradients are on."""
        with arithmetic(self.settings, self.device):
            final = self.top(hidden, lengths)
            return head_loss(self.top, final, labels, train=torch.is_grad_enabled())

    def loss(self, batch: Batch, release: Release) -> HeadLoss:
        """Summed loss of a batch, each record released once."""
        input_ids, labels, lengths = on_device(batch, self.device)
        own = self.run_bottom(input_ids, lengths)
        return self.run_top(own, self.run_trunk(release(self.encode(own)), lengths), lengths, labels)

    def ends_loss(self, batch: Batch) -> HeadLoss:
        """Summed loss of the ends alone, the trunk silent: nothing is released."""
        input_ids, labels, lengths = on_device(batch, self.device)
        own = self._run_bottom(input_ids, lengths)
        return self.run_top(own, torch.zeros_like(own), lengths, labels)

    def save(self, out: Path, card: str = "") -> None:
        """Write the checkpoint with its release. Raises ConfigError, StorageError."""
        weights = {name: weight.detach().cpu() for name, weight in self.segments().items()}
        export_checkpoint(self.folder, TrainedWeights(weights), out, card=card)
        save_release(out, self.narrow)


def public_release(spec: NarrowSpec, generator: torch.Generator) -> Release:
    """Clip per token and noise, as the gate does, from a seeded generator: for public text alone."""

    def release(encoded: Tensor) -> Tensor:
        clipped = clip_tokens(encoded, spec.clip_norm)
        noise = torch.randn(clipped.shape, generator=generator, dtype=torch.float32)
        noised: Tensor = clipped + spec.sigma * noise.to(clipped.device)
        return noised

    return release


def narrow_model(folder: Path, adaptation: Adaptation, device: torch.device) -> NarrowModel:
    """The checkpoint with a release that has not learned anything yet. Raises ConfigError, CheckpointError."""
    hidden = int(CheckpointFolder(folder).config.hidden_size)
    cut = adaptation.cut
    spec = NarrowSpec(cut.n_bottom, cut.n_top, hidden, adaptation.rank, adaptation.noise_multiplier)
    return NarrowModel(folder, adaptation.settings(), NarrowRelease(spec), device)


def adapt(
    model: NarrowModel,
    adaptation: Adaptation,
    records: Records,
    pad: int,
    report: Report = lambda *_: None,
) -> None:
    """Train the ends, then trunk, top and release on public ``records``; short ones are filled with ``pad``.

    Raises NumericalError when the loss is no longer a number; the model is then worthless.
    """
    sample = public_sample(records, pad)
    wanted = public_states(model, sample)
    size, seed = adaptation.records, adaptation.seed
    learn_ends(model, adaptation, drawn(records, adaptation.ends_steps, size, seed, pad), report)
    batches_ = drawn(records, adaptation.steps, size, seed + 1, pad)
    learn_release(model, adaptation, batches_, sample, wanted, report)


def learn_ends(
    model: NarrowModel, adaptation: Adaptation, batches_: Iterable[Batch], report: Report = lambda *_: None
) -> None:
    """The first stage: bottom, top and skip as a small model of their own, a step a batch."""
    with torch.no_grad():
        model.narrow.skip.own.weight.copy_(torch.eye(model.narrow.spec.hidden))
    settings = with_steps(model.settings, adaptation.ends_steps)
    train(model.ends_loss, model.bottom_parts, settings, batches_, report)


def learn_release(
    model: NarrowModel,
    adaptation: Adaptation,
    batches_: Iterable[Batch],
    sample: Batch,
    wanted: Tensor,
    report: Report = lambda *_: None,
) -> None:
    """The second stage: trunk, top and release through the noise, a step a batch; the bottom is frozen.

    ``wanted``: what the bottom made of ``sample`` before the ends were trained (N, D); the trunk is used to that.
    """
    generator = torch.Generator().manual_seed(adaptation.seed + 1)
    skip = model.narrow.skip.own.weight.detach().clone()
    model.narrow.cpu().start_from(public_states(model, sample), wanted, generator)
    model.narrow.to(model.device).skip.own.weight.data.copy_(skip)
    noised = partial(model.loss, release=public_release(model.narrow.spec, generator))
    train(noised, model.joint_parts, model.settings, batches_, report)


def drawn(records: Records, steps: int, size: int, seed: int, pad: int) -> Iterator[Batch]:
    """Batches of ``size`` records for ``steps`` steps, in a seeded order."""
    order = DataOrder(len(records), seed)
    for _ in range(steps):
        yield collate([records[int(index)] for index in order.take(size)], None, pad)


def public_sample(records: Records, pad: int) -> Batch:
    """The public records from which encoder and decoder start."""
    return collate([records[index] for index in range(min(SAMPLE, len(records)))], None, pad)


def with_steps(settings: Federation, steps: int) -> Federation:
    """The same schedule over another number of steps."""
    return settings.model_copy(update={"rounds": settings.rounds.model_copy(update={"local_steps": max(1, steps)})})


def public_states(model: NarrowModel, batch: Batch) -> Tensor:
    """The bottom's output at the real tokens of a public batch: (N, D), on the CPU."""
    input_ids, _, lengths = on_device(batch, model.device)
    rows = model.run_bottom(input_ids, lengths)
    real = torch.arange(input_ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None]
    return rows.cpu()[real]


def train(
    loss_of: Callable[[Batch], HeadLoss],
    parts: Sequence[Mapping[str, nn.Parameter]],
    settings: Federation,
    batches_: Iterable[Batch],
    report: Report,
) -> None:
    """One optimizer step a batch on ``parts``, each clipped by its own norm, on the schedule of ``settings``."""
    optimizers = [PartOptimizer(part, optimizer_spec(settings)) for part in parts]
    for step, batch in enumerate(batches_):
        loss = loss_of(batch)
        if not math.isfinite(loss.mean):
            raise NumericalError(f"the loss is not a number at step {step}", "Lower --learning-rate.")
        for optimizer in optimizers:
            optimizer.step(learning_rate(settings, 0, step), constantly(loss.tokens))
        report(step, loss.mean)


def constantly(tokens: int) -> Callable[[str], int]:
    """Every weight was crossed by so many tokens."""
    return lambda _: tokens


@torch.no_grad()
def evaluate(model: NarrowModel, records: Records, pad: int, release: Release) -> float:
    """Mean loss of records in nats per token, each released once."""
    losses = [model.loss(batch, release) for batch in batches(records, model.settings, pad)]
    return sum(loss.total for loss in losses) / max(1, sum(loss.tokens for loss in losses))


def open_public(paths: Sequence[Path], tokenizer: Any, max_length: int, *, skip_bad: bool = False) -> Records:
    """Public text as records of ``max_length`` tokens, read when asked for. Raises DataError."""
    opened = [open_corpus(path, skip_bad=skip_bad) for path in paths]
    sets: list[Any] = [RecordSet(corpus, range(len(corpus)), tokenizer, max_length, True) for corpus in opened]
    return cast("Records", ConcatDataset(sets))


def publish(
    folder: Path,
    out: Path,
    public: Sequence[Path],
    adaptation: Adaptation,
    device: torch.device,
    *,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What ``splitfl adapt`` does, from folder to folder; returns what it has to tell. Raises SplitFLError."""
    check_free(out)
    tokenizer = open_tokenizer(folder)
    records = open_public(public, tokenizer, adaptation.max_length, skip_bad=skip_bad)
    pad = pad_token(tokenizer)
    model = narrow_model(folder, adaptation, device)
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        stage, count = (
            ("trunk", adaptation.steps) if len(losses) > adaptation.ends_steps else ("ends", adaptation.ends_steps)
        )
        if (step + 1) % 50 == 0 or step + 1 == count:
            say(f"{stage}, step {step + 1} of {count}: {fmean(losses[-50:]):.4f} nats per token")

    adapt(model, adaptation, records, pad, report)
    model.save(out, CARD)
    return {"loss": fmean(losses[-50:]), "steps": adaptation.steps, **asdict(model.narrow.spec), "out": str(out)}
