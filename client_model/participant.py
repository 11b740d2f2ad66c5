"""A client from Hello to the end of the federation: rounds, snapshots, evaluations, faults.

The loop is: ask for a round, take the newest merge, train the local steps, make a snapshot, send the update, and
go on once the merge is durable. After a server's restart it goes back to the snapshot of the last durable round.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from client_model.assets import PIECE_BYTES, Assets, RemoteSource
from client_model.baselines import BaselineRun, Baselines, wanted
from client_model.ends import Ends
from client_model.entry import records_of
from client_model.floor import Floor
from client_model.guard import Accept, Guard
from client_model.link import SessionLostError
from client_model.notary import Notary
from client_model.records import ClientData, open_tokenizer
from client_model.store import ClientStore, SessionRecord, Snapshot, Tally
from client_model.trainer import MissedStepError, Trainer
from splitfl.codec.tensors import check_finite
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch, DataOrder
from splitfl.errors import ConfigError, NumericalError, PrivacyError, ProtocolError, SplitFLError
from splitfl.federation.agreement import Terms
from splitfl.files import sha256_of
from splitfl.privacy.policy import DpSgd
from splitfl.privacy.witness import Mark
from splitfl.split.checkpoint import CheckpointFolder, TensorSource
from splitfl.split.loss import HeadLoss
from splitfl.split.modes import bottom_trains
from splitfl.split.narrow import load_release
from splitfl.split.shares import ends_names
from splitfl.wire.messages import (
    Answer,
    Bye,
    Finished,
    NextRound,
    Request,
    RoundDurable,
    RoundOpen,
    TensorBytes,
    Update,
    Upload,
    Uploaded,
    Welcome,
)

GOODBYE_S = 10.0  # how long a client that is done waits for the server's farewell


class Connection(Protocol):
    """What a participant needs of a link; the websocket link and the lab's in-process one both have it."""

    bytes_sent: int
    bytes_received: int

    def request(self, message: Request) -> Future[Answer]: ...

    def ask(self, message: Request) -> Answer: ...

    @property
    def next_seq(self) -> int: ...


class PausedError(Exception):
    """Ctrl-C: the state is saved."""


@dataclass(frozen=True)
class Event:
    """Something a person or a program wants to see while it happens."""

    event: str
    facts: dict[str, Any]


@dataclass
class Participant:
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
    plan: Cut | None = None  # the cut that was asked for; None takes the federation's own
    accept: Accept = lambda _: False  # asked to accept the federation's terms
    floor: Floor = field(default_factory=Floor)  # the least privacy that this client takes part with
    key_file: Path | None = None
    noise_seed: int | None = None
    simulated: bool = False  # all sides are one person: only then may noise have a seed
    guard: Guard | None = None
    losses: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    in_step: bool = False  # steps are under way: Ctrl-C waits for the end of the one that is
    tally: Tally | None = None
    shared_loss: float | None = None  # what the next update tells of the held-out records
    agreed: tuple[object, ...] = ()  # what of Welcome everything here was prepared for

    def run(self, link: Connection, welcome: Welcome, url: str) -> dict[str, Any]:
        """Take part until the federation ends; returns the closing report.

        Raises PausedError after Ctrl-C, and SplitFLError with its remedy for anything that cannot go on.
        """
        self.link, self.url = link, url
        try:
            return self._run(welcome)
        finally:
            if self.tally is not None:
                with contextlib.suppress(SplitFLError):  # unsaved, it says so itself: it stays open
                    self._save_tally(still_open=False)

    def _run(self, welcome: Welcome) -> dict[str, Any]:
        """Go on, from one restart of the server to the next, until the federation ends."""
        while True:
            try:
                if self.agreed != terms(welcome):
                    self._prepare(welcome)
                self._go_on_from(welcome)
                return self._rounds()
            except SessionLostError as lost:
                welcome = lost.welcome
                self._say("server_restarted", durable_round=welcome.round)

    # -- start -------------------------------------------------------------------------------------------------

    def _prepare(self, welcome: Welcome) -> None:
        """Fetch config, tokenizer and ends; read the data."""
        self.settings: Federation = parse_federation_json(welcome.settings)
        self.cut = self._checked_cut(Cut(welcome.n_bottom, welcome.n_top))
        self._check_state(welcome)
        self._check_terms(welcome)
        self._remember(welcome)
        self.assets = Assets(self.link, self.cache, self.store.model, lambda text: self._say("fetching", text=text))
        self.assets.open(welcome.manifest)
        tokenizer = open_tokenizer(self.store.model)
        self.data = ClientData.open(self.data_path, self.settings, tokenizer, skip_bad=self.skip_bad)
        self._say("data", **self._data_facts())
        self.data.check_fills_a_step()
        self.source: TensorSource = self._open_source()
        self._open_tally()
        self._open_gate()
        self.store.save_federation(welcome.settings, (self.cut.n_bottom, self.cut.n_top))
        self.agreed = terms(welcome)

    def _checked_cut(self, cut: Cut) -> Cut:
        """The server's word on the cut, unless it is not ours: how much stays here is not for it to change."""
        asked = self.plan or (self.cut if self.agreed else self.settings.cut)
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
        """Nothing computed from the data leaves before the terms are accepted and the ledger is the newest one."""
        if self.guard is None:
            self.guard = Guard(self.store, self.key_file, noise_seed=self.noise_seed, simulated=self.simulated)
        self.terms = Terms(self.settings, welcome.manifest)
        self.guard.check_terms(self.terms, self.accept, self.floor)
        self.guard.check_signer(welcome.signer, private=self.settings.privacy.on)
        mark = Mark(welcome.ledger_rows, welcome.ledger_head)
        if not self.guard.check_mark(mark, private=self.settings.privacy.on):
            self._say("ledger_went_back", rows=self.guard.ledger.count, countersigned=mark.count)

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

    def _open_tally(self) -> None:
        """Count on from what earlier starts have saved."""
        if self.tally is None:
            before = self.store.tally()
            if before.data not in ("", self._fingerprint()):
                self._say("data_changed")
            cut_short = before.uncounted_starts + before.open
            self.before = before
            self.tally = replace(before, starts=before.starts + 1, uncounted_starts=cut_short)
        self._save_tally(still_open=True)

    def _save_tally(self, *, still_open: bool) -> None:
        assert self.tally is not None
        traffic = self._total_traffic()
        self.tally = replace(
            self.tally,
            open=still_open,
            data=self._fingerprint(),
            bytes_sent=traffic["bytes_sent"],
            bytes_received=traffic["bytes_received"],
        )
        self.store.save_tally(self.tally)

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

    def _remember(self, welcome: Welcome, next_seq: int = -1) -> None:
        record = SessionRecord(self.name, self.url, welcome.session, next_seq, welcome.incarnation, welcome.manifest)
        self.store.save_session(record)
        self.welcome = welcome

    def _go_on_from(self, welcome: Welcome) -> None:
        """Set up the ends as they were after the last durable round, or in the middle of one after a pause."""
        self._remember(welcome)
        paused = self.store.take_pause()
        resumed = paused is not None and welcome.resumed
        snapshot = paused if resumed else self.store.newest(welcome.round)
        if snapshot is not None and (Cut(*snapshot.cut), snapshot.terms) != (self.cut, self.terms.sha256):
            snapshot = None  # weights that were trained under other terms may tell what these do not allow
        self.ends = self._fresh_ends(self.gate.policy.dp_sgd)
        self.trainer = Trainer(self.ends, self.link, self.gate)
        assert self.guard is not None
        self.notary = Notary(self.link, self.guard.ledger, self.name, welcome.signer)
        self.held_weights = ""
        self.labels: set[int] = set()  # of this start, for the audit of the first update
        self.round = snapshot.round if snapshot else -1
        self.order: DataOrder = self.data.order(self.name, snapshot.cursor if snapshot else (0, 0))
        if snapshot is not None:
            self.ends.load_weights(snapshot.weights)
            self.ends.load_optimizer_tensors(snapshot.optimizer)
        self.unfinished = paused if resumed else None

    def _fresh_ends(self, dp_sgd: DpSgd | None = None) -> Ends:
        """Ends with the base weights; without DP-SGD for what never leaves."""
        narrow = load_release(self.store.model) if self.settings.release.rank is not None else None
        return Ends(self.source, self.settings, self.cut, self.device, dp_sgd, self.gate.noise, narrow)

    # -- rounds ------------------------------------------------------------------------------------------------

    def _rounds(self) -> dict[str, Any]:
        if self.unfinished is not None:
            self._say("resumed", round=self.round, step=self.unfinished.step)
            self._train_round(self.round, self.unfinished.step, self.unfinished.tokens)
        while True:
            self._stop_if_asked(None, 0)
            self._say("waiting", for_="the next round")
            answer = self.link.ask(NextRound(0, 0, self.round))
            if isinstance(answer, Finished):
                return self._finish(answer)
            if not isinstance(answer, RoundOpen):
                raise ProtocolError(f"{type(answer).__name__} instead of a round")
            self._take_merge(answer.weights)
            self._evaluate(answer.round)
            self._train_round(answer.round, 0, 0)

    def _take_merge(self, weights: str) -> None:
        """Load the newest merge, unless it is what we hold. Personal weights stay."""
        if weights and weights != self.held_weights:
            names = self.ends.shared if self.settings.merge.share != "none" else []
            self.ends.load_weights(self.assets.weights(weights, names))
        self.held_weights = weights

    def _train_round(self, round_: int, first_step: int, tokens: int) -> None:
        """The local steps of a round, a snapshot, the update, and the wait until the merge is durable."""
        self.round = round_
        self.in_step = True
        try:
            tokens = self._train_steps(round_, first_step, tokens)
        finally:
            self.in_step = False
        self._send_update(round_, tokens)

    def _train_steps(self, round_: int, first_step: int, tokens: int) -> int:
        """The local steps from ``first_step`` on; returns the tokens of the whole round. Raises PausedError."""
        assert self.guard is not None
        seen, began = 0, time.monotonic()
        for step in range(first_step, self.settings.rounds.local_steps):
            self._stop_if_asked(step, tokens)
            batches = self.data.step(self.order, self.guard.spend(self.gate))
            try:
                loss = self.trainer.step(round_, step, batches)
            except MissedStepError as missed:
                self._say("step_missed", round=round_, step=step, reason=missed.reason)
                tokens += told(batches) if self.gate.policy.private else 0  # whether a step counted is its records' own
                continue
            self.notary.mark()
            self.labels |= {int(label) for batch in batches for label in batch.labels.flat}
            tokens, seen = tokens + told(batches), seen + loss.tokens
            rate = seen / max(1e-9, time.monotonic() - began)
            self._say("step", round=round_, step=step, loss=mean(loss), tokens_per_s=rate, **self._traffic())
        self._stop_if_asked(self.settings.rounds.local_steps, tokens)  # else it would wait for everybody first
        return tokens

    def _send_update(self, round_: int, tokens: int) -> None:
        self.store.save(self._snapshot(round_, self.settings.rounds.local_steps, tokens))
        weights = self.ends.weights()
        shared = {name: weights[name] for name in self.ends.shared}
        digest = self._upload(self.gate.release_weights(round_, shared)) if shared else ""
        if round_ == 0 and self.gate.keepsakes.chosen:
            self.gate.keepsakes.keep_head(shared.get(self.ends.head_name), self.labels)
        self.notary.mark()
        answer = self.link.ask(Update(0, 0, round_, tokens, digest, self.shared_loss))
        self.shared_loss = None
        if not isinstance(answer, RoundDurable):
            raise ProtocolError(f"{type(answer).__name__} instead of a merged round")
        self._take_merge(answer.weights)
        assert self.tally is not None
        self.tally = replace(self.tally, rounds_taken=self.tally.rounds_taken + answer.merged)
        self._save_tally(still_open=True)
        self._say("round_durable", round=round_, merged=answer.merged)

    def _upload(self, data: bytes) -> str:
        """Send a blob in pieces; returns its hash."""
        digest, view = sha256_of(data), memoryview(data)
        for offset in range(0, len(data), PIECE_BYTES):
            piece = view[offset : offset + PIECE_BYTES]
            tensor = TensorBytes("u8", (len(piece),), piece)
            answer = self.link.ask(Upload(0, 0, digest, offset, len(data), tensor))
            if not isinstance(answer, Uploaded):
                raise ProtocolError(f"{type(answer).__name__} instead of a receipt")
        return digest

    def _snapshot(self, round_: int, step: int, tokens: int) -> Snapshot:
        cut = (self.cut.n_bottom, self.cut.n_top)
        weights, moments = self.ends.weights(), self.ends.optimizer_tensors()
        return Snapshot(round_, step, tokens, self.order.cursor, cut, weights, moments, self.terms.sha256)

    def _stop_if_asked(self, step: int | None, tokens: int) -> None:
        """On Ctrl-C: save where we are, so that the next start goes on here. Raises PausedError."""
        if not self.stop():
            return
        self.notary.settle()  # nothing may be unanswered when the session is taken up again
        if step is not None:
            self.store.save_pause(self._snapshot(self.round, step, tokens))
            self._remember(self.welcome, self.link.next_seq)
        raise PausedError

    # -- measuring and the end ---------------------------------------------------------------------------------

    def _evaluate(self, round_: int) -> None:
        """Loss on the held-out rows with the weights that ``round_`` starts from."""
        every = self.settings.evaluation.every_rounds
        last = round_ == self.settings.rounds.count
        if not self.evaluation or not (round_ == 0 or last or (every and round_ % every == 0)):
            return
        each: list[float] | None = [] if self.settings.evaluation.share_metrics else None
        self.shared_loss = None
        try:
            loss = self.trainer.evaluate(round_, self.evaluation, each)
            if each and not last:
                records = [record for batch in self.evaluation for record in records_of(batch)]
                with contextlib.suppress(PrivacyError):  # a round that is done again has no budget for it
                    self.shared_loss = self.gate.release_metric(round_, each, records)
            self.notary.mark()
            check_finite(torch.tensor(loss.total), "the loss")
        except (MissedStepError, NumericalError) as error:  # weights that overflow must not end the federation
            self._say("evaluation_failed", round=round_, reason=str(error))
            return
        self.losses = [entry for entry in self.losses if entry["round"] < round_]  # a round that is done again
        self.losses.append({"round": round_, "loss": mean(loss), "tokens": loss.tokens})
        self._say("evaluation", round=round_, loss=mean(loss), perplexity=math.exp(min(50.0, mean(loss))))

    def _finish(self, finished: Finished) -> dict[str, Any]:
        self._take_merge(finished.weights)
        self._evaluate(finished.round + 1)
        path = self.store.save_merged({name: tensor.contiguous() for name, tensor in self.ends.weights().items()})
        baselines = self._baselines()
        self.notary.settle()
        self._say_goodbye()
        assert self.tally is not None
        assert self.guard is not None
        return {
            "client": self.name,
            "federation": self.settings.name,
            "rounds": finished.round + 1,
            "rounds_taken": self.tally.rounds_taken,
            "starts": self.tally.starts,
            "uncounted_starts": self.tally.uncounted_starts,
            "cut": str(self.cut),
            "held_out_losses": self.losses,
            "baselines": None if baselines is None else {**asdict(baselines), "earned": baselines.earned},
            "data": self._data_facts(),
            "bytes": self._total_traffic(),
            "privacy": self.guard.report(self.gate),
            "weights": str(path),
            "seconds": time.monotonic() - self.started,
        }

    def _baselines(self) -> Baselines | None:
        """What this client would have reached without the split; None where that is not asked for."""
        ends_too, top_too = wanted(self.settings, self.cut)
        if not (self.evaluation and self.losses and (ends_too or top_too)) or self.ends.trunk_is_empty:
            return None
        run = BaselineRun(self.name, self.data, self.evaluation, self.link, self.gate, self._fresh_ends)
        self._say("baselines")
        return Baselines(
            self.losses[-1]["loss"], run.ends_only() if ends_too else None, run.top_only() if top_too else None
        )

    def _say_goodbye(self) -> None:
        """Tell the server that it need not stay for us; all is on disk, so it does not matter whether it hears."""
        with contextlib.suppress(SplitFLError, TimeoutError):
            self.link.request(Bye(0, 0, "finished")).result(timeout=GOODBYE_S)

    def _traffic(self) -> dict[str, int]:
        return {"bytes_sent": self.link.bytes_sent, "bytes_received": self.link.bytes_received}

    def _total_traffic(self) -> dict[str, int]:
        """Over all starts, as far as they were counted."""
        sent, received = self.before.bytes_sent, self.before.bytes_received
        return {"bytes_sent": sent + self.link.bytes_sent, "bytes_received": received + self.link.bytes_received}

    def _say(self, event: str, **facts: Any) -> None:
        self.report(Event(event, facts))


def terms(welcome: Welcome) -> tuple[object, ...]:
    """What a client must prepare anew for when a restarted server says otherwise."""
    return welcome.settings, welcome.manifest, welcome.n_bottom, welcome.n_top


def told(batches: Sequence[Batch]) -> int:
    """Tokens of a step as the server is told."""
    return sum(batch.told_tokens for batch in batches)


def mean(loss: HeadLoss) -> float:
    """Nats a token."""
    return loss.total / max(1, loss.tokens)


def parse_federation_json(text: str) -> Federation:
    """The settings out of Welcome. Raises ProtocolError when they are none."""
    try:
        return parse_federation(json.loads(text), "the server's settings")
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the server's settings are not JSON", "Install the same release on both sides.") from error
