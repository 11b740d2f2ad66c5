"""A client before its first round: what it was given, and what it makes of the server's Welcome.

It checks the terms, fetches config, tokenizer and ends, reads the data and opens the gate. Nothing computed from the
data leaves here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from client_model.asking import Asker
from client_model.assets import Assets, RemoteSource
from client_model.choices import Choices
from client_model.counting import Count
from client_model.events import Event
from client_model.floor import Floor
from client_model.guard import Accept, Guard
from client_model.journal import Journal
from client_model.records import ClientData, open_tokenizer
from client_model.store import ClientStore, SessionRecord
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch
from splitfl.errors import ConfigError, ProtocolError
from splitfl.federation.agreement import Terms
from splitfl.privacy.witness import Mark
from splitfl.split.checkpoint import CheckpointFolder, TensorSource
from splitfl.split.flow import bottom_trains
from splitfl.split.shares import ends_names
from splitfl.wire.messages import Answer, Request, Welcome


class Connection(Asker, Protocol):
    """What a participant needs of a link; the websocket link and the lab's in-process one both have it."""

    bytes_sent: int
    bytes_received: int
    journal: Journal

    def ask(self, message: Request) -> Answer: ...

    def go_on(self) -> None: ...

    def acknowledge(self, welcome: Welcome) -> None: ...

    @property
    def next_seq(self) -> int: ...


@dataclass
class Candidate:
    """One client in one federation. ``stop`` is asked between steps; True pauses."""

    name: str
    data_path: Path
    store: ClientStore
    cache: Path
    device: torch.device
    report: Callable[[Event], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    skip_bad: bool = False
    local_model: Path | None = None
    plan: Choices = field(default_factory=Choices)  # what this client wants for itself
    accept: Accept = lambda _: False  # asked to accept the federation's terms
    floor: Floor = field(default_factory=Floor)  # the least privacy that this client takes part with
    key_file: Path | None = None
    noise_seed: int | None = None
    simulated: bool = False  # all sides are one person: only then may noise have a seed
    guard: Guard | None = None
    started: float = field(default_factory=time.monotonic)
    count: Count | None = None
    prepared_for: tuple[object, ...] = ()  # what of Welcome everything here was prepared for
    link: Connection = field(init=False)
    url: str = field(init=False)
    held: Choices = field(init=False)  # what it takes part with, nothing left open

    def _prepare(self, welcome: Welcome) -> None:
        """Fetch config, tokenizer and ends; read the data."""
        self.settings: Federation = parse_federation_json(welcome.settings)
        self.cut = self._checked_cut(Cut(welcome.n_bottom, welcome.n_top))
        self._check_state(welcome)
        self._check_terms(welcome)
        self._check_journal(welcome)
        self.link.go_on()
        self._remember(welcome)
        self.held = replace(self.plan, cut=self.cut).settled(self.settings)
        self.settings = self.plan.applied(self.settings)
        self.assets = Assets(self.link, self.cache, self.store.model, lambda text: self._say("fetching", text=text))
        self.assets.open(welcome.manifest)
        tokenizer = open_tokenizer(self.store.model)
        self.data = ClientData.open(self.data_path, self.settings, tokenizer, skip_bad=self.skip_bad)
        self._say("data", **self._data_facts())
        self.data.check_fills_a_step()
        assert self.guard is not None
        self.guard.check_floor(self.settings, self.data, self.floor)
        self.source: TensorSource = self._open_source()
        self._open_count()
        self._open_gate()
        self.store.save_federation(welcome.settings, (self.cut.n_bottom, self.cut.n_top), self.plan.as_table())
        self.prepared_for = preparation(welcome)

    def _checked_cut(self, cut: Cut) -> Cut:
        """The server's word on the cut, unless it is not ours: how much stays here is not for it to change."""
        asked = self.plan.cut or (self.cut if self.prepared_for else self.settings.cut)
        if cut != asked:
            raise ProtocolError(f"the server says cut {cut}, this client keeps {asked}", "Do not trust this server.")
        return cut

    def _check_state(self, welcome: Welcome) -> None:
        """Raise ConfigError when the state folder belongs to a federation on another model."""
        record = self.store.session()
        if record is not None and record.manifest not in ("", welcome.manifest) and self.store.rounds():
            raise ConfigError(
                f"{self.store.folder} holds the state of another federation", "Name another --state, or delete it."
            )

    def _check_terms(self, welcome: Welcome) -> None:
        """Nothing computed from the data leaves before the terms are accepted."""
        if self.guard is None:
            self.guard = Guard(self.store, self.key_file, noise_seed=self.noise_seed, simulated=self.simulated)
        self.terms = Terms(self.settings, welcome.manifest)
        self.guard.check_terms(self.terms, self.accept)
        self._check_countersigner(welcome)

    def _check_journal(self, welcome: Welcome) -> None:
        """What a journal holds was sent under the terms and to the server that it names, and goes to no other.

        A server that restarts forgets its sessions, so an honest one never goes on with a session under other terms.
        """
        head = self.link.journal.head if welcome.resumed else None
        if head is not None and (head.terms, head.signer) != (self.terms.sha256, welcome.signer):
            raise ProtocolError(
                "the server goes on with a session under other terms, or with another key", "Do not trust this server."
            )

    def _check_countersigner(self, welcome: Welcome) -> None:
        """Nothing leaves to a server that cannot know, or does not say, what has left before."""
        assert self.guard is not None
        self.guard.check_signer(welcome.signer, private=self.settings.privacy.on)
        mark = Mark(welcome.ledger_rows, welcome.ledger_head)
        if not self.guard.check_mark(mark, private=self.settings.privacy.on):
            self._say("ledger_went_back", rows=self.guard.ledger.count, countersigned=mark.count)

    def _remember(self, welcome: Welcome) -> None:
        record = SessionRecord(self.name, self.url, welcome.session, welcome.incarnation, welcome.manifest)
        self.store.save_session(record)
        self.welcome = welcome

    def _open_source(self) -> TensorSource:
        if self.local_model is not None:
            return self.assets.same_as_local(CheckpointFolder(self.local_model), self.cut)
        source = RemoteSource(self.assets)
        self.assets.fetch_tensors(ends_names(source.config, self.cut))
        return source

    def _open_gate(self) -> None:
        """The door out, for these settings; what privacy there is, is said before anything leaves."""
        assert self.guard is not None
        arithmetic = f"{self.settings.model.compute} {self.device.type}"
        context = f"{self.welcome.manifest} {self.cut.n_bottom} {arithmetic}"
        trains = bottom_trains(self.settings, self.cut)
        self.gate = self.guard.open_gate(self.settings, self.data, context, bottom_trains=trains)
        self.evaluation: list[Batch] = self.data.evaluation(self.guard.spend(self.gate))
        report = self.guard.report(self.gate)
        self._say("privacy", **{key: report[key] for key in ("mode", "statement")})

    def _open_count(self) -> None:
        """Count on from what earlier starts have saved."""
        fingerprint = self._fingerprint()
        if self.count is None:
            self.count = Count(self.store, self.link)
            if self.count.before.data not in ("", fingerprint):
                self._say("data_changed")
        self.count.save(still_open=True, data=fingerprint)

    def _fingerprint(self) -> str:
        """Tells whether the data file is still the same, to whoever has the key alone."""
        assert self.guard is not None
        return hmac.new(self.guard.key.derived("data file"), self.data.fingerprint.encode(), hashlib.sha256).hexdigest()

    def _data_facts(self) -> dict[str, Any]:
        return {
            "rows": self.data.rows,
            "train_records": len(self.data.train),
            "held_out_records": len(self.data.held_out) if self.data.held_out is not None else 0,
            "skipped_rows": self.data.skipped,
            "truncated_records": self.data.train.truncated,
            "parted_rows": self.data.train.parted,
        }

    def _say(self, event: str, **facts: Any) -> None:
        self.report(Event(event, facts))


def preparation(welcome: Welcome) -> tuple[object, ...]:
    """What a client must prepare anew for when a restarted server says otherwise."""
    return welcome.settings, welcome.manifest, welcome.n_bottom, welcome.n_top


def parse_federation_json(text: str) -> Federation:
    """The settings out of Welcome. Raises ProtocolError when they are none."""
    try:
        return parse_federation(json.loads(text), "the server's settings")
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the server's settings are not JSON", "Install the same release on both sides.") from error
