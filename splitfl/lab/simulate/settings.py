"""What a simulation is: a model, data, how the data are dealt to clients, and a federation. One TOML file.

The federation's own settings stand under ``[federation]``, unchanged: both have a table ``[model]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from server_model.members import MAX_SESSIONS
from splitfl.config import Federation, Section, parse_section, read_toml
from splitfl.cut import Cut
from splitfl.data.notes import SPECIALTIES
from splitfl.errors import ConfigError


class ModelSource(Section):
    """The model that is trained: a folder, or a small one that is made with random weights."""

    folder: Path | None = Field(
        None, strict=False, description="folder of a Hugging Face checkpoint; none = one is made"
    )
    family: str = Field("llama", description="of the model that is made; no unit")
    layers: int = Field(4, ge=1, description="blocks of the model that is made")
    hidden: int = Field(64, ge=1, description="width of its hidden states, in numbers")
    vocab: int = Field(1024, ge=1, description="tokens in its vocabulary")
    corpus: tuple[Annotated[Path, Field(strict=False)], ...] = Field(
        (), strict=False, description="public texts that its tokenizer is trained on; none = synthetic general notes"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="draws its weights; no unit")

    @model_validator(mode="after")
    def folder_stands_alone(self) -> ModelSource:
        if self.folder is not None and len(self.model_fields_set) > 1:
            raise ValueError("folder names a model that is there already: leave out the other fields")
        return self


class DataSource(Section):
    """The rows that are dealt: of a file, or synthetic clinical notes."""

    path: Path | None = Field(
        None, strict=False, description=".jsonl, .csv, .txt, .parquet or a folder; none = notes are made"
    )
    group: str = Field("", description="column that says a row's group (its label); none = rows have no groups")
    specialties: tuple[str, ...] = Field(
        ("cardiology", "oncology", "paediatrics"),
        strict=False,
        min_length=1,
        description="of the notes that are made: their groups",
    )
    rows: int = Field(400, ge=1, description="notes of each specialty")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="draws the notes; no unit")

    @model_validator(mode="after")
    def file_or_notes(self) -> DataSource:
        if self.path is not None and self.model_fields_set & {"specialties", "rows", "seed"}:
            raise ValueError("path names data that are there already: leave out specialties, rows and seed")
        if self.path is None and self.group:
            raise ValueError("group is a column of path; the group of a note is its specialty")
        unknown = [name for name in self.specialties if name not in SPECIALTIES]
        if unknown or len(set(self.specialties)) < len(self.specialties):
            raise ValueError(f"specialties are, once each, some of {', '.join(SPECIALTIES)}")
        return self

    @property
    def has_groups(self) -> bool:
        return self.path is None or bool(self.group)


class PartitionSettings(Section):
    """Who gets which rows."""

    kind: Literal["iid", "dirichlet", "group", "quantity"] = Field(
        "dirichlet",
        description="iid: alike; dirichlet: each client its own mixture of groups; group: each client one group; "
        "quantity: a random share of the rows, large or small",
    )
    clients: int = Field(10, ge=1, le=MAX_SESSIONS, description="clients, named client-0000 and so on")
    alpha: float = Field(
        0.5, gt=0, description="dirichlet, quantity: small = clients unlike, large = alike; concentration, no unit"
    )
    min_rows: int = Field(2, ge=1, description="rows of a client, at least")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="deals the rows; no unit")

    @property
    def names(self) -> tuple[str, ...]:
        """The clients, in the order in which rows and cuts are dealt."""
        return tuple(f"client-{number:04d}" for number in range(self.clients))


class Simulation(Section):
    """Everything that one simulation is made of."""

    cuts: tuple[str, ...] = Field(
        (),
        strict=False,
        description='blocks kept, as "BOTTOM,TOP", dealt to the clients in turn; none = the federation\'s cut',
    )
    model: ModelSource = ModelSource()
    data: DataSource = DataSource()
    partition: PartitionSettings = PartitionSettings()
    federation: Federation = Field(default_factory=Federation, description="as in federation.toml, unchanged")

    @model_validator(mode="after")
    def parts_fit(self) -> Simulation:
        if self.partition.kind in ("dirichlet", "group") and not self.data.has_groups:
            raise ValueError(f'partition.kind = "{self.partition.kind}" needs the rows\' groups: set data.group')
        if self.federation.rounds.min_clients > self.partition.clients:
            raise ValueError(
                f"federation.rounds.min_clients = {self.federation.rounds.min_clients}, "
                f"but partition.clients = {self.partition.clients}: no round would ever open"
            )
        if self.federation.release.rank is not None and self.model.folder is None:
            raise ValueError("federation.release.rank needs a model.folder that `splitfl adapt` wrote")
        return self

    @model_validator(mode="after")
    def cuts_are_allowed(self) -> Simulation:
        for cut in map(Cut.parse, self.cuts):
            if not self.federation.allows(cut):
                low, high = self.federation.bottoms, self.federation.tops
                raise ValueError(
                    f"cuts: {cut} is outside the federation's own limits "
                    f"(bottom {low[0]} to {low[-1]}, top {high[0]} to {high[-1]})"
                )
        return self

    def cut_of(self, number: int) -> Cut | None:
        """The cut of a client; None is the federation's own."""
        return Cut.parse(self.cuts[number % len(self.cuts)]) if self.cuts else None


def load_simulation(path: Path) -> Simulation:
    """Read a simulation's TOML file; its paths are relative to the file. Raises ConfigError that names the field."""
    settings = parse_section(Simulation, read_toml(path), str(path), "docs/simulating.md")
    model, data = settings.model, settings.data
    here = path.resolve().parent
    model = model.model_copy(
        update={
            "folder": model.folder and here / model.folder,
            "corpus": tuple(here / corpus for corpus in model.corpus),
        }
    )
    data = data.model_copy(update={"path": data.path and here / data.path})
    for needed in filter(None, (model.folder, data.path, *model.corpus)):
        if not needed.exists():
            raise ConfigError(f"{path}: {needed} does not exist", "Paths are relative to the file that names them.")
    return settings.model_copy(update={"model": model, "data": data})
