"""Six hospitals that differ, and the ways to a model that ``splitfl bench federation`` compares on their notes.

All ways start from one base, which has seen public notes alone, and take the same steps on the same records; local-only
and centralised follow the federation's schedule and freezing. Everything runs in this process.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from client_model.records import ClientData, batches, open_tokenizer
from splitfl.config import Federation, parse_federation
from splitfl.data.notes import SPECIALTIES, write_notes
from splitfl.data.packing import Batch
from splitfl.lab.federation import FederationResult, run_federation
from splitfl.lab.simulate.inputs import Inputs, deal_rows, make_model, write_inputs
from splitfl.lab.simulate.settings import DataSource, ModelSource, PartitionSettings, Simulation
from splitfl.lab.whole import WholeModel, central_steps, local_steps, train_like_federation
from splitfl.split.loss import HeadLoss

PUBLIC_SEED = 10_000  # of public notes: private ones have their own seed's
CPU = torch.device("cpu")
Kind = Literal["group", "dirichlet"]
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Scale:
    """Counts and rates; the same for every seed."""

    clients: int = 6
    alpha: float = 0.1  # of the Dirichlet partition over specialties
    notes: int = 200  # private notes of each specialty
    layers: int = 4
    hidden: int = 64
    vocab: int = 1024
    record_tokens: int = 64
    base_notes: int = 2500  # public, general ones
    base_specialty_notes: int = 200  # public ones of each specialty
    base_steps: int = 800
    base_records: int = 8  # in one of those steps
    base_rate: float = 6e-3  # peak step size
    rounds: int = 60
    local_steps: int = 2
    records: int = 4  # in one step of one client
    rate: float = 1e-2  # peak step size
    held_out_fraction: float = 0.15

    def federation(self, seed: int, tables: Tables) -> Federation:
        """The federation that everybody trains as; ``tables`` change it."""
        common: dict[str, dict[str, Any]] = {
            "rounds": {"count": self.rounds, "local_steps": self.local_steps},
            "batch": {"records": self.records, "max_length": self.record_tokens},
            "optimizer": {"learning_rate": self.rate},
            "evaluation": {"held_out_fraction": self.held_out_fraction, "records": 0},  # measured here, on all of them
        }
        changed = {name: {**common.get(name, {}), **tables.get(name, {})} for name in {**common, **tables}}
        return parse_federation({"seed": seed, **changed}, "splitfl bench federation")

    @property
    def public_notes(self) -> dict[str, int]:
        """What the base reads: general notes, and a few of each specialty, for a pretrained model knows the words."""
        return {name: self.base_notes if name == "general" else self.base_specialty_notes for name in SPECIALTIES}

    def base_training(self) -> Federation:
        """How the base is trained on public notes: all of it, from random weights."""
        return Federation.model_validate(
            {
                "rounds": {"count": 1, "local_steps": self.base_steps},
                "batch": {"records": self.base_records, "max_length": self.record_tokens},
                "model": {"freeze_below": 0},
                "optimizer": {"learning_rate": self.base_rate, "warmup_steps": self.base_steps // 20},
                "evaluation": {"held_out_fraction": 0.0},
            }
        )


def make_base(folder: Path, scale: Scale) -> Path:
    """The checkpoint that every way starts from; one that is there already is taken as it is."""
    base = folder / "base"
    if (base / "model.safetensors").exists():
        return base
    notes, settings = folder / "public", scale.base_training()
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        untrained = Path(raw) / "untrained"
        source = ModelSource(layers=scale.layers, hidden=scale.hidden, vocab=scale.vocab)
        make_model(source, untrained, scale.record_tokens)
        for specialty, count in scale.public_notes.items():
            write_notes(notes / f"{specialty}.jsonl", specialty, count, PUBLIC_SEED)
        model = WholeModel(untrained, settings, CPU)
        data = ClientData.open(notes, settings, open_tokenizer(untrained))
        train_like_federation(model, local_steps(data, "public"))
        model.save(base)
    return base


@dataclass(frozen=True)
class Hospitals:
    """The clients of one partition and seed: their notes in ``work``, and each way to a model from ``base``."""

    base: Path
    work: Path
    scale: Scale
    kind: Kind
    seed: int

    def inputs(self) -> Inputs:
        """The notes, dealt; written now unless they are there."""
        specialties = DataSource(rows=self.scale.notes, seed=self.seed)
        dealt = PartitionSettings(
            kind=self.kind, clients=self.scale.clients, alpha=self.scale.alpha, seed=self.seed, min_rows=20
        )
        simulation = Simulation(model=ModelSource(folder=self.base), data=specialties, partition=dealt)
        inputs = Inputs(simulation, self.work / f"{self.kind}-{self.seed}" / "input")
        if not inputs.folder.exists():
            write_inputs(inputs, deal_rows(simulation))
        return inputs

    @cached_property
    def files(self) -> dict[str, Path]:
        """Each client's rows."""
        inputs = self.inputs()
        return {name: inputs.data(name) for name in inputs.simulation.partition.names}

    @cached_property
    def settings(self) -> Federation:
        """How the baselines train."""
        return self.scale.federation(self.seed, {})

    @cached_property
    def data(self) -> dict[str, ClientData]:
        """Each client's records."""
        tokenizer = open_tokenizer(self.base)
        return {name: ClientData.open(path, self.settings, tokenizer) for name, path in self.files.items()}

    @cached_property
    def held_out(self) -> list[list[Batch]]:
        """All that each client held out, in batches that are quick to measure."""
        wide = self.scale.federation(self.seed, {"batch": {"records": 32}})
        rows = [(data.held_out, data.pad_token_id) for data in self.data.values()]
        return [batches(records[:], wide, pad) for records, pad in rows if records is not None]

    def untouched(self) -> dict[str, Any]:
        """The base as it is."""
        return self.measured([self.open(self.base)], {})

    def federated(self, tables: Tables) -> dict[str, Any]:
        """A federation whose settings ``tables`` change; with personal heads there is one model a client."""
        settings = self.scale.federation(self.seed, tables)
        owners = list(self.files) if settings.merge.share == "none" else [None]
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            result = run_federation(self.base, self.files, settings, Path(folder) / "state")
            models = [
                self.open(result.export(Path(folder) / f"exported-{number}", client=owner))
                for number, owner in enumerate(owners)
            ]
            return self.measured(models, traffic(result))

    def local_only(self) -> dict[str, Any]:
        """Each client alone."""
        models = [self.open(self.base) for _ in self.data]
        for model, (name, data) in zip(models, self.data.items(), strict=True):
            train_like_federation(model, local_steps(data, name))
        return self.measured(models, {})

    def centralised(self) -> dict[str, Any]:
        """All notes in one place."""
        model = self.open(self.base)
        train_like_federation(model, central_steps(self.data))
        return self.measured([model], {"both ways": sum(path.stat().st_size for path in self.files.values())})

    def at_rate(self, rate: float) -> Hospitals:
        """The same hospitals with another peak step size."""
        return replace(self, scale=replace(self.scale, rate=rate))

    def open(self, folder: Path) -> WholeModel:
        return WholeModel(folder, self.settings, CPU)

    def measured(self, models: Sequence[WholeModel], sent: Mapping[str, int]) -> dict[str, Any]:
        """Losses of one model for all, or of one a client, in nats per token: of each over the rows that all clients
        held out (``union``), and of each client's model over its own (``own``). ``sent`` is in bytes."""
        losses = [[model.evaluate(rows) for rows in self.held_out] for model in models]
        own = losses[0] if len(models) == 1 else [row[client] for client, row in enumerate(losses)]
        return {"union": [mean(row) for row in losses], "own": mean(own), "bytes": dict(sent)}


def mean(losses: Sequence[HeadLoss]) -> float:
    """Nats per token over all of them."""
    return HeadLoss(sum(loss.total for loss in losses), sum(loss.tokens for loss in losses)).mean


def traffic(result: FederationResult) -> dict[str, int]:
    """Bytes of all clients: both ways, and of these what left a client, by kind."""
    left: Counter[str] = Counter()
    for report in result.reports.values():
        left.update({f"{kind} up": what["bytes"] for kind, what in report["privacy"]["left"].items()})
    return {"both ways": sum(sum(report["bytes"].values()) for report in result.reports.values()), **left}
