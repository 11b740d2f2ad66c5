"""The demo's training without a federation: ``python -m splitfl.lab.demo.worker TASK FOLDER THREADS DEVICE``.

``base`` trains the base model and adapts it to a narrow release: what the server publishes. ``local-only`` and
``centralised`` are the whole-model baselines, from the base model on; ``alone`` and ``merged`` train the clients' tops
without a federation, from the published model on. All have the federation's steps, schedule and freezing. Each prints
JSON events; all held-out losses that the report states come from here, over every held-out record of every client; what
has a release is measured through it, with fresh noise.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from client_model.records import ClientData, batches, open_tokenizer, pad_token
from server_model.exporting import export_state
from splitfl.console import command, print_json
from splitfl.cut import Cut
from splitfl.data.packing import Batch
from splitfl.data.readers import open_corpus
from splitfl.lab.adapt import CARD, Adaptation, adapt, narrow_model, open_public
from splitfl.lab.demo.alone import (
    LossOf,
    TopTrainer,
    measure,
    open_narrow,
    released_once,
    through_noise,
    train_together,
)
from splitfl.lab.demo.results import ENDS_ONLY, MERGED_ENDS, TOP_ONLY, alone
from splitfl.lab.demo.scale import CLIENTS, CUT, PUBLIC, DemoFolder, DemoScale
from splitfl.lab.whole import WholeModel, central_steps, local_steps, train_like_federation
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.split.loss import HeadLoss
from splitfl.split.modes import choose_device
from splitfl.split.segment import Piece, Segment
from splitfl.split.shares import ends_pieces, weight_names

BASE_CARD = "A small model, trained for a minute on synthetic clinical notes by `splitfl demo`. For nothing else.\n"


def make_base(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """The base model, and out of it the published one."""
    train_base(folder, scale, seed, device)
    publish_base(folder, scale, seed, device)
    print_json({"event": "parameters", **count_parameters(CheckpointFolder(folder.base), CUT)})


def train_base(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """Tokenizer and model from the public notes alone."""
    public = folder.notes(PUBLIC)
    create_checkpoint(
        folder.random_weights,
        family="llama",
        layers=scale.layers,
        hidden=scale.hidden,
        vocab=scale.vocab,
        corpus=(example.content().decode() for example in open_corpus(public)),
        seed=seed,
        max_length=scale.record_tokens,
    )
    settings = scale.base_training(seed)
    data = ClientData.open(public, settings, open_tokenizer(folder.random_weights))
    model = WholeModel(folder.random_weights, settings, device)
    train_like_federation(model, local_steps(data, PUBLIC), StepEvents("base"))
    model.save(folder.base, BASE_CARD)


def publish_base(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """The base model with a narrow release, as `splitfl adapt` makes it out of public notes."""
    adaptation = Adaptation(
        cut=CUT,
        rank=scale.rank,
        noise_multiplier=scale.noise,
        ends_steps=scale.ends_steps,
        steps=scale.adapt_steps,
        records=scale.adapt_records,
        max_length=scale.record_tokens,
        learning_rate=scale.adapt_rate,
        seed=seed,
    )
    tokenizer = open_tokenizer(folder.base)
    records = open_public([folder.notes(PUBLIC)], tokenizer, adaptation.max_length)
    model = narrow_model(folder.base, adaptation, device)
    say, tokens = StepEvents("adaptation"), adaptation.records * (adaptation.max_length - 1)
    numbers = count()  # ``adapt`` counts each of its two stages from 0
    adapt(
        model,
        adaptation,
        records,
        pad_token(tokenizer),
        lambda _, loss: say(next(numbers), HeadLoss(loss * tokens, tokens)),
    )
    model.save(folder.published, BASE_CARD + CARD)


def count_parameters(source: CheckpointFolder, cut: Cut) -> dict[str, int]:
    """Weights at the bottom, in the trunk and at the top."""
    config = source.config
    bottom, top = ends_pieces(cut, config.num_hidden_layers)
    between = cut.trunk(config.num_hidden_layers)
    pieces = {"bottom": bottom, "trunk": Piece(between.start, between.stop), "top": top}
    names = {part: weight_names(Segment(config, piece), tied=False) for part, piece in pieces.items()}
    return {part: sum(math.prod(source.entries[name].shape) for name in names[part]) for part in names}


class Bench:
    """What all baselines need: the clients' data, the base model, and the one way to measure."""

    def __init__(self, folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
        self.folder = folder
        self.settings = scale.federation(seed)
        self.device = device
        tokenizer = open_tokenizer(folder.base)
        self.data = {name: ClientData.open(folder.notes(name), self.settings, tokenizer) for name in CLIENTS}
        self.held_out = {name: self._held_out(data) for name, data in self.data.items()}
        self.curve = {name: data.evaluation() for name, data in self.data.items()}

    def _held_out(self, data: ClientData) -> list[Batch]:
        assert data.held_out is not None
        return batches(data.held_out[:], self.settings, data.pad_token_id)

    def open(self, folder: Path) -> WholeModel:
        return WholeModel(folder, self.settings, self.device)

    def train(self, name: str, steps: Callable[[], list[Batch]], measured: tuple[str, ...]) -> WholeModel:
        """A baseline from the base model on; after every round it is measured as the clients measure theirs."""
        model = self.open(self.folder.base)
        each_round = RoundEvents(name, model, {client: self.curve[client] for client in measured})
        say = StepEvents(name)

        def report(step: int, loss: HeadLoss) -> None:
            say(step, loss)
            each_round(step)

        each_round(-1)
        train_like_federation(model, steps, report)
        return model

    def measure(self, name: str, loss_of: LossOf) -> None:
        """Summed loss over all that each client held out."""
        losses = {client: measure(loss_of, held_out) for client, held_out in self.held_out.items()}
        totals = {client: {"total": loss.total, "tokens": loss.tokens} for client, loss in losses.items()}
        print_json({"event": "held_out", "model": name, "losses": totals})


def train_local_only(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """Each client alone: the whole model, its own notes."""
    bench = Bench(folder, scale, seed, device)
    for client in CLIENTS:
        model = bench.train(client, local_steps(bench.data[client], client), (client,))
        bench.measure(client, without_training(model))


def train_centralised(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """All notes in one place; before that, the base model as it is."""
    bench = Bench(folder, scale, seed, device)
    bench.measure("before", without_training(bench.open(folder.base)))
    model = bench.train("centralised", central_steps(bench.data), CLIENTS)
    bench.measure("centralised", without_training(model))


def train_alone(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """Each client's top alone, without and with the trunk; before that the federation's model, and what it began as."""
    bench = Bench(folder, scale, seed, device)
    export_state(folder.trunk, folder.exported, client=None, dtype="float32")
    for name, path in (("published", folder.published), ("federated", folder.exported)):
        bench.measure(name, through_noise(open_narrow(path, bench.settings, device), seed))
    for client, data in bench.data.items():
        data.name_records(client.encode())
        for kind in (ENDS_ONLY, TOP_ONLY):
            name, model = alone(kind, client), open_narrow(folder.published, bench.settings, device)
            ends = kind == ENDS_ONLY
            loss_of = model.ends_loss if ends else released_once(model)
            train_together([TopTrainer(model, loss_of, data, client, StepEvents(name))])
            bench.measure(name, model.ends_loss if ends else through_noise(model, seed))


def train_merged(folder: DemoFolder, scale: DemoScale, seed: int, device: torch.device) -> None:
    """All clients' tops without the trunk, averaged after every round."""
    bench = Bench(folder, scale, seed, device)
    models = {client: open_narrow(folder.published, bench.settings, device) for client in CLIENTS}
    trainers = [
        TopTrainer(model, model.ends_loss, bench.data[client], client, StepEvents(alone(MERGED_ENDS, client)))
        for client, model in models.items()
    ]
    train_together(trainers)
    bench.measure(MERGED_ENDS, models[CLIENTS[0]].ends_loss)


def without_training(model: WholeModel) -> LossOf:
    """Loss of the whole model."""
    return lambda batch: model.loss(batch, train=False)


class StepEvents:
    """Prints an event a step."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.began = time.monotonic()
        self.tokens = 0

    def __call__(self, step: int, loss: HeadLoss) -> None:
        self.tokens += loss.tokens
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        print_json({"event": "step", "model": self.model, "step": step, "loss": loss.mean, "tokens_per_s": rate})


class RoundEvents:
    """Prints held-out losses after every round: the points of a curve."""

    def __init__(self, name: str, model: WholeModel, held_out: dict[str, list[Batch]]) -> None:
        self.name = name
        self.model = model
        self.held_out = held_out

    def __call__(self, step: int) -> None:
        """``step`` has been trained; -1 is before the first."""
        round_, rest = divmod(step + 1, self.model.settings.rounds.local_steps)
        if rest:
            return
        for client, held_out in self.held_out.items():
            mean = self.model.evaluate(held_out).mean
            print_json({"event": "evaluation", "model": self.name, "client": client, "round": round_, "loss": mean})


TASKS = {
    "base": make_base,
    "local-only": train_local_only,
    "centralised": train_centralised,
    "alone": train_alone,
    "merged": train_merged,
}


def main(task: str, path: str, threads: str, device: str) -> None:
    """One task in this process."""
    with command():
        torch.set_num_threads(int(threads))
        folder = DemoFolder(Path(path))
        scale, seed = folder.recall()
        TASKS[task](folder, scale, seed, choose_device(device))


if __name__ == "__main__":
    main(*sys.argv[1:])
