"""A client's own state folder: what it needs to go on after any fault.

    ledger.sqlite               what has left so far, row by row (splitfl.privacy.ledger)
    releases.sqlite             noised bytes that left, encrypted (splitfl.privacy.vault)
    key-id                      this folder's random name, which finds its key (client_model.keys)
    agreement.txt               the terms that were accepted last, in words
    countersigner               who countersigns the ledger: a public key
    audit.json                  what `splitfl audit` found, and of which ledger
    identity/                   certificate and private key of an invitation (client_model.identity)
    tally.json                  starts, rounds and traffic so far
    federation.json             the settings that were agreed to, the cut, and what else this client chose
    plan.json                   what `--plan auto` chose last, and for which machine and link (client_model.replanning)
    client.json                 name, federation, session token
    journal                     what was sent and heard since the snapshot to go on from (client_model.journal)
    model/                      config and tokenizer as the server handed them out
    snapshots/round-000003/     weights, optimizer, correction (.safetensors), state.json
    pause/                      the same in the middle of a round, after Ctrl-C
    merged.safetensors          the trained weights at the end
    .new-*                      half-written, or an update while it is sent; deleted at the next start
    closing.json                the closing report, once the rounds are over

A snapshot is the state after a round's local steps, before the merge; the last two are kept, for the server may
restart and go back by one. It holds no text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from splitfl.codec.stored import StoredTensors, write_tensors
from splitfl.errors import StorageError
from splitfl.files import clear_unfinished, new_folder, numbered, storage_errors, sync, write_file

KEPT_SNAPSHOTS = 2
PARTS = ("weights", "optimizer", "correction")  # of a snapshot, a safetensors file each


@dataclass(frozen=True)
class Snapshot:
    """Where a client stood: ``round``, the next ``step`` in it and the label ``tokens`` so far, weights, moments, and
    what the strategy's correction of gradients keeps. Of one that was read, tensors are read when they are used."""

    round: int
    step: int
    tokens: int
    cursor: tuple[int, int]  # epoch, position
    cut: tuple[int, int]
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    terms: str = ""  # SHA-256 of the agreement under which it was trained
    correction: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SessionRecord:
    """Which session of which server this client had last."""

    name: str
    url: str
    token: str = ""
    incarnation: str = ""
    manifest: str = ""  # of the base model, to tell federations apart


@dataclass(frozen=True)
class Tally:
    """What this client has done over all its starts, as far as it was saved. Bytes are those on the link."""

    starts: int = 0
    uncounted_starts: int = 0  # those that were cut short: what they sent after their last saved tally is unknown
    open: bool = False  # a start is under way, or was cut short
    rounds_taken: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    data: str = ""  # fingerprint of the data file


class ClientStore:
    """The state folder of one client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        self.model = folder / "model"
        self.snapshots = folder / "snapshots"
        self.pause_folder = folder / "pause"
        self.journal = folder / "journal"
        with storage_errors(folder):
            for place in (folder, self.snapshots):
                clear_unfinished(place)

    def session(self) -> SessionRecord | None:
        """The last session, or None on a fresh folder. Raises StorageError when the record is damaged."""
        path = self.folder / "client.json"
        if not path.exists():
            return None
        try:
            return SessionRecord(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read", "Delete the folder to start this client anew.") from error

    def save_session(self, record: SessionRecord) -> None:
        """Remember a session."""
        write_file(self.folder / "client.json", json.dumps(asdict(record)).encode())

    def save_federation(self, settings: str, cut: tuple[int, int], choices: Mapping[str, Any] | None = None) -> None:
        """Remember the settings (JSON) that this client takes part under, its cut, and what it chose for itself."""
        facts = {"settings": settings, "cut": cut, "choices": choices}
        write_file(self.folder / "federation.json", json.dumps(facts).encode())

    def federation(self) -> tuple[str, tuple[int, int]]:
        """What ``save_federation`` wrote. Raises StorageError when there is none."""
        path = self.folder / "federation.json"
        try:
            facts = json.loads(path.read_text())
            return str(facts["settings"]), (int(facts["cut"][0]), int(facts["cut"][1]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} cannot be read", "Name the state folder of a client that took part.") from error

    def took_part(self) -> bool:
        """Whether something may have left: a client writes down what it takes part with before it sends any of it."""
        return (self.folder / "federation.json").exists()

    def choices(self) -> Mapping[str, Any] | None:
        """What was chosen beside them; None for nothing. Raises StorageError as ``federation``."""
        self.federation()
        choices: Mapping[str, Any] | None = json.loads((self.folder / "federation.json").read_text()).get("choices")
        return choices

    def tally(self) -> Tally:
        """What was saved last; an empty one on a fresh folder. Raises StorageError when it is damaged."""
        path = self.folder / "tally.json"
        if not path.exists():
            return Tally()
        try:
            return Tally(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(
                f"{path} cannot be read", "Put it back from a copy; without it nobody can say what left before."
            ) from error

    def save_tally(self, tally: Tally) -> None:
        """Make the tally durable."""
        write_file(self.folder / "tally.json", json.dumps(asdict(tally)).encode())

    def save(self, snapshot: Snapshot) -> str:
        """Make a snapshot durable and forget all but the last two; returns its name. Raises StorageError."""
        name = self.name_of(snapshot.round)
        self._write(self.folder / name, snapshot)
        for number in self.rounds()[:-KEPT_SNAPSHOTS]:
            shutil.rmtree(self.snapshots / f"round-{number:06d}", ignore_errors=True)
        return name

    @staticmethod
    def name_of(round_: int) -> str:
        """What the snapshot of a round is called."""
        return f"snapshots/round-{round_:06d}"

    def read(self, name: str) -> Snapshot:
        """The snapshot or pause that was saved as ``name``. Raises StorageError."""
        return self._read(self.folder / name)

    def rounds(self) -> list[int]:
        """Rounds that have a snapshot, oldest first."""
        if not self.snapshots.is_dir():
            return []
        return numbered(self.snapshots, "round-")

    def newest(self, upto: int) -> Snapshot | None:
        """The newest snapshot of a round up to ``upto``; later ones, which the server has lost, are deleted."""
        kept = [number for number in self.rounds() if number <= upto]
        for number in self.rounds()[len(kept) :]:
            shutil.rmtree(self.snapshots / f"round-{number:06d}", ignore_errors=True)
        return self._read(self.snapshots / f"round-{kept[-1]:06d}") if kept else None

    def weights_after(self, round_: int) -> Mapping[str, Tensor]:
        """The weights in the snapshot of ``round_``. Raises StorageError."""
        folder = self.folder / self.name_of(round_)
        with readable(folder):
            return StoredTensors(folder / "weights.safetensors")

    def before(self, round_: int) -> Snapshot | None:
        """The newest snapshot of a round before ``round_``: what a client with one of ``round_`` began that from."""
        earlier = [number for number in self.rounds() if number < round_]
        return self.read(self.name_of(earlier[-1])) if earlier else None

    def save_pause(self, snapshot: Snapshot) -> str:
        """Remember the middle of a round; returns its name. Raises StorageError."""
        self._write(self.pause_folder, snapshot)
        return self.pause_folder.name

    def forget_pause(self) -> None:
        """Nothing goes on from there any more."""
        shutil.rmtree(self.pause_folder, ignore_errors=True)

    def save_closing(self, report: Mapping[str, Any]) -> None:
        """Make the closing report durable: from now on this client can end without the server."""
        write_file(self.folder / "closing.json", json.dumps(report).encode())

    def closing(self) -> dict[str, Any] | None:
        """The closing report, with what is counted by now; None while there are rounds. Raises StorageError."""
        path = self.folder / "closing.json"
        if not path.exists():
            return None
        tally = self.tally()
        traffic = {"bytes_sent": tally.bytes_sent, "bytes_received": tally.bytes_received}
        counted = {"starts": tally.starts, "uncounted_starts": tally.uncounted_starts + tally.open, "bytes": traffic}
        try:
            return {**json.loads(path.read_text()), **counted}
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read", "Delete it: with the server there it is made anew.") from error

    def forget_closing(self) -> None:
        """There are rounds again. Raises StorageError."""
        with storage_errors(self.folder):
            (self.folder / "closing.json").unlink(missing_ok=True)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Where a file may be written that is deleted afterwards, or at the next start."""
        path = self.folder / f".new-{name}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def save_merged(self, weights: Mapping[str, Tensor]) -> Path:
        """Leave the trained ends on disk."""
        path = self.folder / "merged.safetensors"
        with storage_errors(path), self.scratch(path.name) as work:
            write_tensors(weights, work)
            sync(work)
            work.replace(path)
        return path

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        facts: dict[str, object] = {"round": snapshot.round, "step": snapshot.step, "tokens": snapshot.tokens}
        facts |= {"cursor": snapshot.cursor, "cut": snapshot.cut, "terms": snapshot.terms}
        with new_folder(folder) as work:
            for part in PARTS:
                write_tensors(getattr(snapshot, part), work / f"{part}.safetensors")
            (work / "state.json").write_text(json.dumps(facts))

    def _read(self, folder: Path) -> Snapshot:
        with readable(folder):
            facts = json.loads((folder / "state.json").read_text())
            weights, optimizer, correction = (StoredTensors(folder / f"{part}.safetensors") for part in PARTS)
            epoch, position = facts["cursor"]
            cut = (int(facts["cut"][0]), int(facts["cut"][1]))
            place = (int(facts["round"]), int(facts["step"]), int(facts["tokens"]))
            terms = str(facts.get("terms", ""))
            return Snapshot(*place, (epoch, position), cut, weights, optimizer, terms, correction)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever is wrong with the snapshot in ``folder`` into a StorageError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(
            f"{folder} cannot be read", f"Delete {folder}: the client then goes on from the newest merge."
        ) from error
