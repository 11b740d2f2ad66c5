"""How large the demo is: every size in one frozen place, and the settings that follow from it.

The defaults fit two cores and four minutes, most of which the baselines take. A test takes smaller numbers and runs
the same code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitfl.config import (
    Agreement,
    Batch,
    Evaluation,
    Federation,
    Merge,
    Model,
    Optimizer,
    Privacy,
    ReleaseSettings,
    Rounds,
)
from splitfl.cut import Cut

CLIENTS = ("cardiology", "oncology", "paediatrics")
PUBLIC = "general"
CUT = Cut(1, 1)
AGREEMENT = Agreement(
    owner="nobody: this is a demonstration on one machine",
    contact="whoever started it",
    purpose="to show a federation at work, on notes that a generator made up",
)


@dataclass(frozen=True)
class DemoScale:
    """Counts and rates; the same for every seed."""

    notes: int = 2000  # private notes of each client
    public_notes: int = 4000
    layers: int = 6
    hidden: int = 128
    vocab: int = 2048
    record_tokens: int = 128
    records: int = 4  # in one step of one client
    base_steps: int = 500
    base_rate: float = 3e-3  # peak step size
    rank: int = 16  # numbers a token that leave a client
    noise: float = 0.5  # their noise, in clip norms
    ends_steps: int = 100  # of the publisher, on the ends alone
    adapt_steps: int = 120  # of the publisher, on trunk and top through the noise
    adapt_records: int = 8  # in one of those steps
    adapt_rate: float = 2e-3  # peak step size
    rounds: int = 6
    local_steps: int = 16
    rate: float = 4e-3  # peak step size
    held_out_fraction: float = 0.03
    curve_records: int = 32  # held-out records that the curves are measured on, after every round

    def federation(self, seed: int) -> Federation:
        """What the trunk serves, and what the baselines train by: records, steps, schedule, freezing."""
        steps = self.rounds * self.local_steps
        return Federation(
            name="three-hospitals",
            seed=seed,
            rounds=Rounds(count=self.rounds, local_steps=self.local_steps, min_clients=len(CLIENTS)),
            batch=Batch(records=self.records, max_length=self.record_tokens),
            model=Model(n_bottom=CUT.n_bottom, n_top=CUT.n_top),
            optimizer=Optimizer(learning_rate=self.rate, warmup_steps=steps // 20),
            merge=Merge(share="ends"),
            evaluation=Evaluation(
                held_out_fraction=self.held_out_fraction,
                records=self.curve_records,
                baselines="none",  # the demo measures them itself, on all held-out records
            ),
            release=ReleaseSettings(rank=self.rank),
            privacy=Privacy(mode="measured", noise_multiplier=self.noise),
            agreement=AGREEMENT,
        )

    def base_training(self, seed: int) -> Federation:
        """How the base model is trained on public notes before anybody joins: all of it, from random weights."""
        optimizer = Optimizer(
            learning_rate=self.base_rate, warmup_steps=self.base_steps // 20, beta2=0.95, final_fraction=0.05
        )
        return Federation(
            name="base",
            seed=seed,
            rounds=Rounds(count=1, local_steps=self.base_steps),
            batch=Batch(records=self.records, max_length=self.record_tokens),
            model=Model(freeze_below=0),
            optimizer=optimizer,
            evaluation=Evaluation(held_out_fraction=0.0),
        )


@dataclass(frozen=True)
class DemoFolder:
    """Where everything of one demo lies."""

    path: Path

    def notes(self, name: str) -> Path:
        return self.path / "notes" / f"{name}.jsonl"

    def client(self, name: str) -> Path:
        return self.path / "clients" / name

    @property
    def random_weights(self) -> Path:
        return self.path / "base-untrained"

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def published(self) -> Path:
        return self.path / "published"

    @property
    def federation(self) -> Path:
        return self.path / "federation.toml"

    @property
    def trunk(self) -> Path:
        return self.path / "trunk"

    @property
    def exported(self) -> Path:
        return self.path / "federated"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def _settings(self) -> Path:
        return self.path / "demo.json"

    def remember(self, scale: DemoScale, seed: int) -> None:
        """Write what this demo is, for its workers."""
        self._settings.write_text(json.dumps({"seed": seed, **asdict(scale)}, indent=2) + "\n")
        self.federation.write_text(as_toml(scale.federation(seed)))

    def recall(self) -> tuple[DemoScale, int]:
        """The scale and seed that :meth:`remember` wrote."""
        facts = json.loads(self._settings.read_text())
        return DemoScale(**{name: value for name, value in facts.items() if name != "seed"}), facts["seed"]


def as_toml(settings: Federation) -> str:
    """The fields that were set, as a ``federation.toml`` with each field's meaning beside it."""
    top: list[str] = []
    tables: list[str] = []
    for name, value in settings.model_dump(exclude_unset=True).items():
        if isinstance(value, dict):
            fields = type(getattr(settings, name)).model_fields
            tables += ["", f"[{name}]", *(toml_line(key, item, fields[key].description) for key, item in value.items())]
        else:
            top.append(toml_line(name, value, type(settings).model_fields[name].description))
    return "\n".join([*top, *tables]) + "\n"


def toml_line(name: str, value: Any, meaning: str | None) -> str:
    """One field; strings, numbers and truth values are written in TOML as in JSON."""
    return f"{name} = {json.dumps(value)}  # {meaning}"
