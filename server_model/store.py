"""The trunk service's state folder: one folder a durable round, whole or not there; the last three are kept.

federation.json             settings, model folder
rounds/round-000004/        trunk, optimizer, merged, strategy (.safetensors), state.json
uploads/                    clients' weights on their way in
agreement.txt               the terms that clients accept, and their hash
ledgers/                    what was countersigned of each client's ledger, and the key that signs
releases/                   released activations, so that clients send them once
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from splitfl.codec.stored import write_tensors
from splitfl.config import Federation, parse_federation
from splitfl.errors import ConfigError, StorageError
from splitfl.files import clear_unfinished, keep_file, new_folder, numbered, storage_errors

KEPT_ROUNDS = 3
PARTS = ("trunk", "optimizer", "merged", "strategy")  # of a round, a safetensors file each
DIGESTS = "sha256"  # of these files, in state.json


@dataclass(frozen=True)
class RoundState:
    """What a durable round consists of. ``merged`` are the clients' merged weights, ``trunk`` the server's.

    ``strategy`` is what the strategy remembers, ``NAME/what`` -> tensor.
    """

    round: int
    trunk: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    facts: Mapping[str, object]
    strategy: Mapping[str, Tensor] = field(default_factory=dict)


class Store:
    """The state folder. Raises ConfigError when it belongs to another federation, StorageError when it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds = folder / "rounds"
        self.uploads = folder / "uploads"

    def begin(self, model: Path, settings: Federation, fingerprint: str, *, resume: bool) -> None:
        """Make the folder this federation's, or go on with the one it holds; one without a round is free to take.

        ``fingerprint`` tells the base model from others. Raises ConfigError for another model, or other settings.
        """
        if self.durable_rounds():
            if not resume:
                raise ConfigError(
                    f"{self.folder} already holds a federation", "Add --resume to go on with it, or name a new --state."
                )
            check_same(self.federation()[1], settings)
            if self._record()["fingerprint"] != fingerprint:
                raise ConfigError(
                    f"{model} is not the model that {self.folder} was begun with",
                    f"Name {self.federation()[0]}, or a new --state.",
                )
        self._clear_leftovers()  # first, for they may be what fills the disk
        content = {
            "model": str(model.resolve()),
            "fingerprint": fingerprint,
            "settings": settings.model_dump(mode="json"),
        }
        keep_file(self.folder / "federation.json", json.dumps(content, indent=2).encode())
        with storage_errors(self.folder):
            self.uploads.mkdir(parents=True, exist_ok=True)
            self.uploads.chmod(0o700)

    def _clear_leftovers(self) -> None:
        """What an earlier start had begun to write, and what clients had sent it: they send it again."""
        with storage_errors(self.folder):
            for folder in (self.folder, self.rounds):
                clear_unfinished(folder)
        shutil.rmtree(self.uploads, ignore_errors=True)

    def federation(self) -> tuple[Path, Federation]:
        """The model folder and settings that this state belongs to. Raises ConfigError, StorageError."""
        content = self._record()
        return Path(content["model"]), parse_federation(content["settings"], str(self.folder / "federation.json"))

    def _record(self) -> dict[str, Any]:
        record = self.folder / "federation.json"
        try:
            content: dict[str, Any] = json.loads(record.read_text())
            if not content.keys() >= {"model", "fingerprint", "settings"}:
                raise ValueError("a field is missing")
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.folder} is not a state folder of `splitfl serve`", "Name the folder given to --state."
            ) from error
        except (OSError, ValueError, AttributeError) as error:
            raise StorageError(f"{record} cannot be read", "Restore it from a backup.") from error
        return content

    def folder_of(self, round_: int) -> Path:
        return self.rounds / f"round-{round_:06d}"

    def durable_rounds(self) -> list[int]:
        """Numbers of the rounds on disk, oldest first."""
        if not self.rounds.is_dir():
            return []
        return numbered(self.rounds, "round-")

    def save(self, state: RoundState) -> Path:
        """Make a round durable. Raises StorageError, and then the older rounds are still whole."""
        folder = self.folder_of(state.round)
        with new_folder(folder) as work:
            for name in PARTS:
                write_tensors(getattr(state, name), work / f"{name}.safetensors")
            facts = {"round": state.round, DIGESTS: digests(work), **state.facts}
            (work / "state.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
        return folder

    def prune(self) -> list[Path]:
        """Delete all but the last three rounds; returns what was deleted."""
        old = [self.folder_of(number) for number in self.durable_rounds()[:-KEPT_ROUNDS]]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        return old

    def load(self, round_: int) -> RoundState:
        """Read a durable round back. Raises StorageError."""
        folder = self.folder_of(round_)
        try:
            facts = json.loads((folder / "state.json").read_text())
            if facts.pop(DIGESTS, None) not in (None, digests(folder)):
                raise ValueError("a file is not what was written")
            parts = {name: load_file(folder / f"{name}.safetensors") for name in PARTS}
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise StorageError(
                f"{folder} cannot be read", "Delete it: the round before it is still there, and --resume uses that."
            ) from error
        return RoundState(round=round_, facts=facts, **parts)

    def tensor(self, round_: int, name: str) -> Tensor | None:
        """One weight as a kept round left it, merged or the trunk's; None where it holds none. Raises StorageError."""
        for part in ("merged", "trunk"):
            path = self.folder_of(round_) / f"{part}.safetensors"
            try:
                with safe_open(path, framework="pt") as file:
                    if name in file.keys():  # noqa: SIM118 - safe_open is no dict
                        return cast(Tensor, file.get_tensor(name))
            except (OSError, SafetensorError) as error:
                raise StorageError(f"{path} cannot be read", "Restore it from a backup.") from error
        return None


def check_same(before: Federation, now: Federation) -> None:
    """Raise ConfigError for a change that the durable rounds cannot take: what trains, and how it is merged."""
    fixed = {
        "seed": (before.seed, now.seed),
        "model": (before.model, now.model),
        "merge": (before.merge, now.merge),
        "optimizer.name": (before.optimizer.name, now.optimizer.name),
        "optimizer.client_name": (before.optimizer.of_clients, now.optimizer.of_clients),
    }
    for name, (old, new) in fixed.items():
        if old != new:
            raise ConfigError(
                f"{name} differs from what this federation was begun with",
                "Leave out --federation to go on with its own settings, or name a new --state.",
            )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a round's files by the part that each holds: a disk may give back other bits than it was given."""
    found = {}
    for name in PARTS:
        with (folder / f"{name}.safetensors").open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
