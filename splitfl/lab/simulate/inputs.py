"""What a simulation starts from, written once: the model where one is made, and each client's rows.

    input/simulation.json       the settings, to tell whether --resume goes on with the same ones
    input/model/                the model, unless a folder was named
    input/client-0000.jsonl     a client's rows
    input/groups.json           rows of each group, by client

The folder is whole or not there, so that a run which was killed while it was written begins anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

from splitfl.data.examples import Example
from splitfl.data.notes import generate_notes
from splitfl.data.partitions import Partition, by_group, dirichlet, iid, quantity_skew
from splitfl.data.readers import Corpus, open_corpus, read_groups
from splitfl.errors import ConfigError, StorageError
from splitfl.files import new_folder
from splitfl.lab.simulate.settings import DataSource, ModelSource, PartitionSettings, Simulation
from splitfl.split.create import create_checkpoint

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


def open_inputs(simulation: Simulation, out: Path) -> Inputs:
    """The inputs in ``out``, written now unless they are there. Raises ConfigError, DataError, and nothing is left."""
    inputs = Inputs(simulation, out / "input")
    if not inputs.folder.exists():
        with new_folder(inputs.folder) as work:
            write_inputs(simulation, work)
    return inputs


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


def write_inputs(simulation: Simulation, folder: Path) -> None:
    """Write everything that a simulation starts from into ``folder``."""
    rows, groups = read_rows(simulation.data)
    partition = deal(simulation.partition, groups)
    held = {}
    for name, numbers in zip(simulation.partition.names, partition, strict=True):
        write_rows(folder / f"{name}.jsonl", (rows[int(number)] for number in numbers))
        held[name] = Counter(groups[number] for number in numbers)
    if simulation.model.folder is None:
        make_model(simulation.model, folder / "model", simulation.federation.batch.max_length)
    (folder / "groups.json").write_text(json.dumps(held, sort_keys=True))
    (folder / "simulation.json").write_text(as_json(simulation))


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
