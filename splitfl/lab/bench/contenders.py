"""What the privacy benchmark compares: baselines that release nothing or everything, and mechanisms between them.

All get the same private steps, and the step size that serves them best on the held-out text: the choice flatters every
contender alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_model.records import batches
from client_model.trainer import on_device
from splitfl.codec.stored import FOR_TRANSFORMERS, write_tensors
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.packing import DataOrder, collate
from splitfl.data.records import Record
from splitfl.federation.schedule import learning_rate
from splitfl.lab.adapt import (
    Adaptation,
    NarrowModel,
    Release,
    drawn,
    learn_ends,
    learn_release,
    narrow_model,
    public_release,
    public_sample,
    public_states,
)
from splitfl.lab.bench.texts import Texts
from splitfl.lab.whole import WholeModel
from splitfl.privacy.mechanism import clip_tokens
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.export import TOKENIZER_FILES
from splitfl.split.loss import HeadLoss
from splitfl.split.modes import optimizer_spec
from splitfl.split.narrow import NarrowRelease, NarrowSpec
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.segment import block_number, renumber, slice_config

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """How much everyone trains: ``public_steps`` first, then ``private_steps`` on private text at each of ``rates``."""

    public_steps: int = 1000
    private_steps: int = 60
    records: int = 16
    length: int = 128
    public_rate: float = 1e-3
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    compute: str = "bf16"

    def settings(
        self, rate: float, *, freeze_below: int = 0, n_top: int = 0, steps: int = 1, schedule: str = "constant"
    ) -> Federation:
        """As a federation would say it, for a whole model."""
        return parse_federation(
            {
                "rounds": {"count": 1, "local_steps": steps},
                "batch": {"records": self.records, "max_length": self.length},
                "model": {"n_bottom": 0, "n_top": n_top, "freeze_below": freeze_below, "compute": self.compute},
                "optimizer": {"learning_rate": rate, "schedule": schedule},
            },
            "the benchmark",
        )

    def adaptation(self, cut: Cut, rank: int, noise_multiplier: float, seed: int) -> Adaptation:
        return Adaptation(
            cut,
            rank,
            noise_multiplier,
            self.public_steps,
            self.public_steps,
            self.records,
            self.length,
            self.public_rate,
            self.compute,
            seed,
        )


@dataclass(frozen=True)
class Losses:
    """Held-out loss in nats per token: as it is used, and without the noise on the held-out records."""

    noisy: float
    clean: float


def train_publicly(folder: Path, out: Path, texts: Texts, effort: Effort, seed: int) -> None:
    """The whole checkpoint in ``folder`` after the public steps, to a new folder."""
    settings = effort.settings(effort.public_rate, steps=effort.public_steps, schedule="cosine")
    model = WholeModel(folder, settings, CPU)
    for step, batch in enumerate(drawn(texts.public, effort.public_steps, effort.records, seed, 0)):
        model.step([batch], learning_rate(settings, 0, step))
    model.save(out)


def untouched(folder: Path, texts: Texts, effort: Effort) -> float:
    """The base model's loss without any tuning."""
    settings = effort.settings(effort.public_rate)
    return WholeModel(folder, settings, CPU).evaluate(batches(texts.held_out, settings, 0)).mean


def tuned(folder: Path, texts: Texts, effort: Effort, seed: int, *, n_top: int | None = None) -> float:
    """Fine-tune a whole model, as a noise-free split does; or with ``n_top`` its last blocks and head alone.

    The latter is *top-only*, whose activations leave without noise.
    """
    layers: int = CheckpointFolder(folder).config.num_hidden_layers
    below, top = (0, 0) if n_top is None else (layers - n_top, n_top)
    losses = []
    for rate in effort.rates:
        settings = effort.settings(rate, freeze_below=below, n_top=top, steps=effort.private_steps)
        model = WholeModel(folder, settings, CPU)
        for batch in drawn(texts.train, effort.private_steps, effort.records, seed, 0):
            model.step([batch], rate)
        losses.append(model.evaluate(batches(texts.held_out, settings, 0)).mean)
    return min(losses)


def write_ends(base: Path, out: Path, cut: Cut) -> None:
    """The ends of ``base`` as a small model of their own: the blocks of the trunk are left out."""
    source = CheckpointFolder(base)
    layers: int = source.config.num_hidden_layers
    kept = [*range(cut.n_bottom), *cut.top(layers)]
    config = slice_config(source.config, 0, len(kept))
    for name, value in vars(source.config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[block] for block in kept])
    prefix = f"{source.anatomy.prefix}.{source.anatomy.blocks}."
    tensors = {}
    for name in source.entries:
        block = block_number(name, prefix)
        if block is None or block in kept:
            place = name if block is None else renumber(name, prefix, kept.index(block) - block)
            tensors[place] = source.read(name).float()
    out.mkdir(parents=True)
    write_tensors(tensors, out / "model.safetensors", FOR_TRANSFORMERS)
    (out / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "float32"}, default=str))
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


class PlainModel(NarrowModel):
    """Clip and noise on the bottom's output as it is: no encoder, no decoder, no skip."""

    def encode(self, hidden: Tensor) -> Tensor:
        return hidden.float()

    def run_trunk(self, released: Tensor, lengths: Tensor | None) -> Tensor:
        states: Tensor = self.trunk(released, lengths)
        return states

    def run_top(self, own: Tensor, from_trunk: Tensor, lengths: Tensor | None, labels: Tensor) -> HeadLoss:  # noqa: ARG002
        return self.top_loss(from_trunk, lengths, labels)


def plain_model(folder: Path, texts: Texts, effort: Effort, cut: Cut, noise_multiplier: float) -> PlainModel:
    """Plain Gaussian noise; tokens are clipped to the median norm of public ones."""
    settings = effort.adaptation(cut, 1, noise_multiplier, 0).settings()
    hidden = int(CheckpointFolder(folder).config.hidden_size)
    spec = NarrowSpec(cut.n_bottom, cut.n_top, hidden, hidden, noise_multiplier)
    model = PlainModel(folder, settings, NarrowRelease(spec), CPU)
    input_ids, _, lengths = on_device(collate(texts.public[:16], None, 0), CPU)
    median = float(model.run_bottom(input_ids, lengths).norm(dim=-1).median())
    model.narrow.spec = NarrowSpec(cut.n_bottom, cut.n_top, hidden, hidden, noise_multiplier, median)
    return model


def learn_ends_alone(folder: Path, texts: Texts, effort: Effort, cut: Cut, rank: int, out: Path) -> None:
    """The first stage of an adaptation, which no noise level enters: the ends, to one file."""
    adaptation = effort.adaptation(cut, rank, 1.0, 0)
    model = narrow_model(folder, adaptation, CPU)
    learn_ends(model, adaptation, drawn(texts.public, effort.public_steps, effort.records, 0, 0))
    write_tensors(ends_weights(model), out)


def ends_weights(model: NarrowModel) -> dict[str, nn.Parameter]:
    """All that the first stage trains, by names of its own."""
    parts = {"bottom": model.bottom, "top": model.top, "own": model.narrow.skip.own}
    return {f"{part}.{name}": weight for part, module in parts.items() for name, weight in module.named_parameters()}


def adapted_model(
    folder: Path, ends: Path, texts: Texts, effort: Effort, cut: Cut, rank: int, noise_multiplier: float
) -> NarrowModel:
    """A narrow release, adapted on the public text from ``ends`` that were learned before."""
    adaptation = effort.adaptation(cut, rank, noise_multiplier, 0)
    model = narrow_model(folder, adaptation, CPU)
    sample = public_sample(texts.public, 0)
    wanted = public_states(model, sample)
    learned = load_file(ends)
    for name, weight in ends_weights(model).items():
        weight.data.copy_(learned[name])
    batches_ = drawn(texts.public, effort.public_steps, effort.records, 1, 0)
    learn_release(model, adaptation, batches_, sample, wanted)
    return model


@dataclass(frozen=True)
class Released:
    """What there is of a record after its only release: clean states, what was sent, what the trunk made of it."""

    own: Tensor  # (T, D)
    sent: Tensor  # (T, R)
    from_trunk: Tensor  # (T, D)


@torch.no_grad()
def release_once(model: NarrowModel, records: Sequence[Record], release: Release) -> list[Released]:
    """Every record through bottom, release (as bf16, as it travels) and trunk."""
    found = []
    for batch in batches(records, model.settings, 0):
        input_ids, _, lengths = on_device(batch, CPU)
        own = model.run_bottom(input_ids, lengths)
        sent = release(model.encode(own)).bfloat16().float()
        found += [Released(*item) for item in zip(own, sent, model.run_trunk(sent, lengths).float(), strict=True)]
    return found


def without_noise(model: NarrowModel) -> Release:
    """Clip alone."""
    return lambda encoded: clip_tokens(encoded, model.narrow.spec.clip_norm)


def blanked(release: Release) -> Release:
    """The same noise on nothing."""
    return lambda encoded: release(torch.zeros_like(encoded))


class TopTuning:
    """The client's top and mixing weights, tuned on private records that were each released once.

    The trunk is frozen and no gradient leaves. ``seed`` draws noise and order. ``blank`` is the control: noise alone is
    sent, so that whatever the other one gains beyond it, and nothing else, is owed to the release.
    """

    def __init__(self, model: NarrowModel, texts: Texts, effort: Effort, seed: int, *, blank: bool = False) -> None:
        self.model, self.texts, self.effort, self.seed = model, texts, effort, seed
        noise = public_release(model.narrow.spec, torch.Generator().manual_seed(seed))
        if blank:
            noise = blanked(noise)
        self.train = release_once(model, texts.train, noise)
        self.held_out = release_once(model, texts.held_out, noise)
        self.held_out_clean = release_once(model, texts.held_out, without_noise(model))

    def run(self) -> Losses:
        """Held-out losses at the best step size; the model is left as it was."""
        modules = (self.model.top, self.model.narrow)
        kept = [deepcopy(module.state_dict()) for module in modules]
        found = []
        for rate in self.effort.rates:
            self._tune(rate)
            found.append(Losses(self._loss(self.held_out), self._loss(self.held_out_clean)))
            for module, state in zip(modules, kept, strict=True):
                module.load_state_dict(state)
        return min(found, key=lambda losses: losses.noisy)

    def _tune(self, rate: float) -> None:
        skip = {f"skip.{name}": weight for name, weight in self.model.narrow.skip.named_parameters()}
        spec = optimizer_spec(self.model.settings)
        parts = [PartOptimizer(part, spec) for part in (self.model.top.trainable(), skip)]
        order = DataOrder(len(self.train), self.seed)
        for _ in range(self.effort.private_steps):
            rows = order.take(self.effort.records).tolist()
            loss = self._forward([self.texts.train[row] for row in rows], [self.train[row] for row in rows])
            for part in parts:
                part.step(rate, constant(loss.tokens))

    def _forward(self, records: Sequence[Record], released: Sequence[Released]) -> HeadLoss:
        _, labels, lengths = on_device(collate(records, None, 0), CPU)
        own = torch.stack([item.own for item in released])
        return self.model.run_top(own, torch.stack([item.from_trunk for item in released]), lengths, labels)

    @torch.no_grad()
    def _loss(self, released: Sequence[Released]) -> float:
        size = self.effort.records
        losses = [
            self._forward(self.texts.held_out[start : start + size], released[start : start + size])
            for start in range(0, len(released), size)
        ]
        return sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)


def constant(tokens: int) -> Callable[[str], int]:
    return lambda _: tokens
