"""What a simulation starts from, written once: the model where one is made, and each client's rows.

    input/simulation.json       the settings, to tell whether --resume goes on with the same ones
    input/model/                the model, unless a folder was named
    input/client-0000.jsonl     a client's rows
    input/groups.json           rows of each group, by client

What can be refused is refused before it is written. The folder is whole or not there, so that a run which was killed
while it was written begins anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import torch

from server_model.calibration import as_published
from server_model.preparing import check_settings
from splitfl.cut import Cut
from splitfl.data.examples import Example
from splitfl.data.notes import generate_notes
from splitfl.data.partitions import Partition, by_group, dirichlet, iid, quantity_skew
from splitfl.data.readers import Corpus, open_corpus, read_groups
from splitfl.errors import ConfigError, StorageError
from splitfl.files import new_folder
from splitfl.lab.simulate.settings import DataSource, ModelSource, PartitionSettings, Simulation
from splitfl.split.checkpoint import CheckpointFolder, read_config
from splitfl.split.create import create_checkpoint
from splitfl.split.families import small_config
from splitfl.split.selfcheck import check_family_splits

PUBLIC_NOTES = 400  # that the tokenizer of a made model is trained on


@dataclass(frozen=True)
class Inputs:
    """The input folder of a simulation."""

    simulation: Simulation
    folder: Path

    @property
    def model(self) -> Path:
        return self.simulation.model.folder or self.folder / "model"

    def data(self, client: str) -> Path:
        """A client's rows."""
        return self.folder / f"{client}.jsonl"

    def groups(self) -> dict[str, dict[str, int]]:
        """Rows of each group, by client. Raises StorageError."""
        try:
            found: dict[str, dict[str, int]] = json.loads((self.folder / "groups.json").read_text())
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.folder / 'groups.json'} cannot be read", "Start again in a new --out."
            ) from error
        return found


@dataclass(frozen=True)
class Dealt:
    """All rows, the group of each ("" where there are none), and who gets which."""

    rows: Corpus | Sequence[Example]
    groups: Sequence[str]
    partition: Partition


def deal_rows(simulation: Simulation) -> Dealt:
    """Read the rows and deal them; nothing is written. Raises ConfigError, DataError."""
    rows, groups = read_rows(simulation.data)
    return Dealt(rows, groups, deal(simulation.partition, groups))


def write_inputs(inputs: Inputs, dealt: Dealt) -> None:
    """Write everything that a simulation starts from, or nothing. Raises ConfigError, DataError, StorageError."""
    simulation = inputs.simulation
    with new_folder(inputs.folder) as work:
        held = {}
        for name, numbers in zip(simulation.partition.names, dealt.partition, strict=True):
            write_rows(work / f"{name}.jsonl", (dealt.rows[int(number)] for number in numbers))
            held[name] = Counter(dealt.groups[number] for number in numbers)
        if simulation.model.folder is None:
            make_model(simulation.model, work / "model", simulation.federation.batch.max_length)
        (work / "groups.json").write_text(json.dumps(held, sort_keys=True))
        (work / "simulation.json").write_text(as_json(simulation))


def check_out(out: Path, simulation: Simulation, *, resume: bool) -> None:
    """Raise ConfigError unless ``out`` is free, or holds this very simulation and ``resume`` says to go on with it."""
    record = out / "input" / "simulation.json"
    if record.exists():
        if not resume:
            raise ConfigError(
                f"{out} already holds a simulation", "Add --resume to go on with it, or name a new --out."
            )
        if record.read_text() != as_json(simulation):
            raise ConfigError(
                f"the settings are not those that the simulation in {out} was begun with",
                "Put them back to go on with it, or name a new --out.",
            )
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise ConfigError(f"{out} is in use", "Name a new or empty folder with --out.")


def read_rows(source: DataSource) -> tuple[Corpus | Sequence[Example], list[str]]:
    """All rows, and the group of each: "" where there are none. Raises DataError."""
    if source.path is not None:
        corpus = open_corpus(source.path)
        return corpus, read_groups(source.path, source.group) if source.group else [""] * len(corpus)
    notes = [generate_notes(specialty, source.rows, source.seed) for specialty in source.specialties]
    groups = chain.from_iterable(repeat(specialty, source.rows) for specialty in source.specialties)
    return [Example(text=note) for note in chain.from_iterable(notes)], list(groups)


def deal(settings: PartitionSettings, groups: Sequence[str]) -> Partition:
    """Rows to clients. Raises ConfigError when there are too few rows."""
    clients, alpha, seed, least = settings.clients, settings.alpha, settings.seed, settings.min_rows
    match settings.kind:
        case "iid":
            return iid(len(groups), clients, seed, least)
        case "dirichlet":
            return dirichlet(groups, clients, alpha, seed, least)
        case "group":
            return by_group(groups, clients, seed, least)
        case "quantity":
            return quantity_skew(len(groups), clients, alpha, seed, least)


def write_rows(path: Path, rows: Iterable[Example]) -> None:
    """A client's data file, as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.as_row(), ensure_ascii=False) + "\n" for row in rows)


def check_model(simulation: Simulation, device: torch.device) -> None:
    """Raise SplitFLError unless the model can be had and can be trained as the settings say. Nothing is written."""
    source, federation = simulation.model, simulation.federation
    if source.folder is None:
        config = small_config(
            source.family,
            layers=source.layers,
            hidden=source.hidden,
            vocab=source.vocab,
            max_length=federation.batch.max_length,
        )
    else:
        config = read_config(source.folder)
        check_family_splits(config)
    check_settings(federation, config, device)
    for cut in map(Cut.parse, simulation.cuts):
        cut.check(config.num_hidden_layers)
    if source.folder is not None and federation.release.rank is not None:
        as_published(federation, CheckpointFolder(source.folder))


def make_model(source: ModelSource, folder: Path, max_length: int) -> None:
    """A small checkpoint with random weights, its tokenizer from public text."""
    notes = generate_notes("general", PUBLIC_NOTES, source.seed)
    files = (example.plain_text() for path in source.corpus for example in open_corpus(path))
    create_checkpoint(
        folder,
        family=source.family,
        layers=source.layers,
        hidden=source.hidden,
        vocab=source.vocab,
        corpus=files if source.corpus else notes,
        seed=source.seed,
        max_length=max_length,
    )


def as_json(simulation: Simulation) -> str:
    return simulation.model_dump_json(indent=2) + "\n"
