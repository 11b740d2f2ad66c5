"""A client from Hello to the end of the federation: rounds, snapshots, evaluations, faults.

The loop is: ask for a round, take the newest merge, train the local steps, make a snapshot, send the update, and
go on once the merge is durable. After a server's restart it goes back to the snapshot of the last durable round.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from client_model.asking import Asker
from client_model.baselines import BaselineRun, Baselines, wanted
from client_model.candidate import Candidate, Connection, preparation
from client_model.ends import Ends
from client_model.journal import Head
from client_model.link import SessionLostError
from client_model.measuring import Measurements, due
from client_model.notary import Notary
from client_model.sharing import Sharing
from client_model.shortage import ShortageError, is_shortage
from client_model.store import Snapshot
from client_model.trainer import MissedStepError, Trainer
from splitfl.allocator import give_back_freed_memory
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch, DataOrder
from splitfl.errors import ConfigError, NumericalError, ProtocolError, SplitFLError
from splitfl.federation.schedule import round_step_sizes
from splitfl.privacy.policy import DpSgd
from splitfl.split.narrow import load_release
from splitfl.split.shares import check_handover
from splitfl.wire.messages import (
    Bye,
    Finished,
    NextRound,
    RoundDurable,
    RoundOpen,
    Update,
    Welcome,
)

log = logging.getLogger("splitfl.client")
GOODBYE_S = 10.0  # how long a client that is done waits for the server's farewell


class PausedError(Exception):
    """Ctrl-C, all that was asked for is done, or another plan is due: the state is saved.

    ``in_round``: this client is awaited, within the grace period.
    """

    def __init__(self, *, in_round: bool) -> None:
        super().__init__("paused")
        self.in_round = in_round


@dataclass
class Participant(Candidate):
    """Takes part: rounds, snapshots, evaluations, and what becomes of each fault."""

    measured: Measurements = field(default_factory=Measurements)
    row_pieces: int = 1  # in how many pieces a micro-batch is computed: more after each time that memory ran out
    exhausted: bool = False  # it ran out though no smaller pieces can be had
    only_finish: bool = False  # stop as soon as the round that was paused is merged
    wants_plan: Callable[[Asker], bool] = lambda _: False  # asked between rounds; True stops for another plan
    in_step: bool = False  # steps are under way: Ctrl-C waits for the end of the one that is

    def run(self, link: Connection, welcome: Welcome, url: str) -> dict[str, Any]:
        """Take part until the federation ends; returns the closing report.

        Raises PausedError after Ctrl-C, ShortageError when memory has run out, and SplitFLError with its remedy for
        anything that cannot go on. After a pause or a shortage it may be called again, with another link.
        """
        self.link, self.url = link, url
        self.prepared_for = ()  # what was prepared speaks to the link before
        if self.count is not None:
            self.count.go_on(link)
        try:
            return self._run(welcome)
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            said = str(error)
        finally:
            if self.count is not None:
                with contextlib.suppress(SplitFLError):  # unsaved, it says so itself: it stays open
                    self.count.save(still_open=False)

        raise self._shortage(said)  # outside of the handler, whose traceback holds tensors

    def _shortage(self, said: str) -> ShortageError:
        """Let go of the ends, and halve the pieces that they compute in."""
        vars(self).pop("ends", None)
        vars(self).pop("trainer", None)
        gc.collect()
        give_back_freed_memory()
        rows = self.settings.batch.records // self.settings.batch.micro_batches
        self.exhausted, self.row_pieces = self.row_pieces >= rows, min(rows, 2 * self.row_pieces)
        log.info("%s", said)
        if self.exhausted:
            return ShortageError(
                "out of memory, one record at a time too",
                "Give this process more and run the same command again: within "
                f"{self.settings.trunk.grace_s:g} s it goes on in its round. Or take a smaller cut with --plan after "
                "this round, if the federation allows one.",
            )
        self._say("memory_short", pieces=self.row_pieces)
        return ShortageError("out of memory", "It goes on with smaller pieces.")

    def _run(self, welcome: Welcome) -> dict[str, Any]:
        """Go on, from one restart of the server to the next, until the federation ends."""
        while True:
            try:
                if self.prepared_for != preparation(welcome):
                    self._prepare(welcome)
                else:
                    self._check_countersigner(welcome)
                self._go_on_from(welcome)
                return self._rounds()
            except SessionLostError as lost:
                restarted = lost.welcome.incarnation != self.welcome.incarnation
                welcome = lost.welcome
                self.link.acknowledge(welcome)
                self._say("server_restarted" if restarted else "away_too_long", durable_round=welcome.round)

    def _go_on_from(self, welcome: Welcome) -> None:
        """Set up the ends as they were after the last durable round, or where the journal of this session begins."""
        self._remember(welcome)
        head = self.link.journal.head if welcome.resumed else None
        snapshot = self._newest(welcome.round) if head is None else self._base(head)
        if snapshot is not None:
            self._change_cut(Cut(*snapshot.cut))
        self.ends = self._fresh_ends(self.settings, self.gate.policy.dp_sgd)
        self.trainer = Trainer(self.ends, self.link, self.gate)
        assert self.guard is not None
        self.notary = Notary(self.link, self.guard.ledger, self.name, welcome.signer)
        self.sharing = Sharing(self.ends, self.link, self.assets, self.gate, self.store)
        self.labels: set[int] = set()  # of this start, for the audit of the first update
        self.round = snapshot.round if snapshot else -1
        self.order: DataOrder = self.data.order(self.name, snapshot.cursor if snapshot else (0, 0))
        if snapshot is not None:
            self.ends.load_weights(snapshot.weights)
            self.ends.load_optimizer_tensors(snapshot.optimizer)
            self.ends.load_correction_tensors(snapshot.correction)
        self.unfinished = snapshot if head is not None and head.in_round else None
        if head is None:
            self._begin_journal("" if snapshot is None else self.store.name_of(snapshot.round), in_round=False)
        else:
            self._say_resumed()

    def _newest(self, durable: int) -> Snapshot | None:
        """The snapshot of the last durable round; None for the published weights."""
        snapshot = self.store.newest(durable)
        if snapshot is not None and snapshot.terms != self.terms.sha256:
            return None  # weights that were trained under other terms may tell what these do not allow
        return snapshot

    def _base(self, head: Head) -> Snapshot | None:
        """The state that the journal begins at. Raises ConfigError when its round cannot be done again."""
        if self.link.journal.doing_again and head.data != self._fingerprint():
            raise ConfigError(
                f"{self.data_path} has changed in the middle of a round",
                "Put it back as it was, time of change included (cp -p), "
                f"or delete {self.store.journal} to go on with the next round.",
            )
        return self.store.read(head.base) if head.base else None

    def _begin_journal(self, base: str, *, in_round: bool) -> None:
        """From now on a crash goes back to ``base``. Steps of DP-SGD cannot be done again: their noise is not kept."""
        head = Head(
            base,
            in_round,
            self.welcome.session,
            self.link.next_seq,
            data=self._fingerprint(),
            plan=str(self.held),
            terms=self.terms.sha256,
            signer=self.welcome.signer,
            floor=repr(self.floor),
            url=self.url,
        )
        self.link.journal.begin(head, only_head=self.gate.policy.dp_sgd is not None)
        if base != self.store.pause_folder.name:
            self.store.forget_pause()

    def _say_resumed(self) -> None:
        """Say which step the round was left in; those before it are done again from the journal."""
        at = self.link.journal.last_step
        again = at is not None
        if at is None and self.unfinished is not None:
            at = (self.unfinished.round, self.unfinished.step)
        if at is not None:
            self._say("resumed", round=at[0], step=at[1], again=again)

    def _change_cut(self, before: Cut) -> None:
        """Say so when the cut is another one than before. Raises ConfigError where the blocks cannot change hands."""
        if before != self.cut:
            check_handover(self.settings, before, self.cut)
            anew = self.gate.policy.private and before.n_bottom != self.cut.n_bottom
            self._say("cut_changed", before=str(before), now=str(self.cut), released_anew=anew)

    def _fresh_ends(self, settings: Federation, dp_sgd: DpSgd | None = None) -> Ends:
        """Ends with the base weights; without DP-SGD for what never leaves."""
        narrow = load_release(self.store.model) if settings.release.rank is not None else None
        ends = Ends(self.source, settings, self.cut, self.device, dp_sgd, self.gate.noise, narrow)
        ends.row_pieces = self.row_pieces
        return ends

    # -- rounds ------------------------------------------------------------------------------------------------

    def _rounds(self) -> dict[str, Any]:
        if self.unfinished is not None:
            self._go_on_in(self.unfinished)
        while True:
            self._stop_if_asked(None, 0)
            last = self.round + 1 >= self.settings.rounds.count
            self._say("waiting", for_="the last merge" if last else "the next round")
            answer = self.link.ask(NextRound(0, 0, self.round))
            if isinstance(answer, Finished):
                return self._finish(answer)
            if not isinstance(answer, RoundOpen):
                raise ProtocolError(f"{type(answer).__name__} instead of a round")
            if not self.round < answer.round < self.settings.rounds.count:
                raise ProtocolError(
                    f"the server opens round {answer.round + 1} of {self.settings.rounds.count} after {self.round + 1}",
                    "Do not trust this server: each round is trained once.",
                )
            self.store.forget_closing()
            if not self._take_merge_in_time(answer.weights):
                continue
            self.ends.begin_round(self.sharing.beside)
            self._evaluate(answer.round)
            self._train_round(answer.round, 0, 0)

    def _go_on_in(self, unfinished: Snapshot) -> None:
        """Finish the round of a snapshot or a pause."""
        if unfinished.step < self.settings.rounds.local_steps:
            self._train_round(unfinished.round, unfinished.step, unfinished.tokens)
        else:
            self._send_update(unfinished)

    def _take_merge_in_time(self, weights: str) -> bool:
        """Load the newest merge; False when it is gone and a newer one is to be asked for."""
        taken = self.sharing.take_in_time(weights, doing_again=self.link.journal.doing_again)
        if not taken:
            self._say("merge_missed")
        return taken

    def _train_round(self, round_: int, first_step: int, tokens: int) -> None:
        """The local steps of a round, a snapshot, the update, and the wait until the merge is durable."""
        self.round = round_
        self.in_step = True
        try:
            tokens = self._train_steps(round_, first_step, tokens)
        finally:
            self.in_step = False
        self.notary.settle()
        self.ends.end_round(round_step_sizes(self.settings, round_))
        snapshot = self._snapshot(round_, self.settings.rounds.local_steps, tokens)
        self._begin_journal(self.store.save(snapshot), in_round=True)
        self._send_update(snapshot)

    def _train_steps(self, round_: int, first_step: int, tokens: int) -> int:
        """The local steps from ``first_step`` on; returns the tokens of the whole round. Raises PausedError."""
        assert self.count is not None
        seen, began = 0, time.monotonic()
        for step in range(first_step, self.settings.rounds.local_steps):
            self._stop_if_asked(step, tokens)
            batches = self._next_batches(round_, step)
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
            of = {"rounds": self.settings.rounds.count, "steps": self.settings.rounds.local_steps}
            self._say("step", round=round_, step=step, loss=loss.mean, tokens_per_s=rate, **of, **self.count.traffic())
        return tokens

    def _next_batches(self, round_: int, step: int) -> list[Batch]:
        """The micro-batches of a step. Its records had the budget for it once, and have it when it is done again."""
        numbers, cursor = self.link.journal.once(f"step {round_} {step}", self._pick)
        if self.order.cursor != tuple(cursor):
            self.order = self.data.order(self.name, tuple(cursor))
        return self.data.micro_batches(numbers)

    def _pick(self) -> tuple[list[int], tuple[int, int]]:
        """The next step's records, and where the data order stands then."""
        assert self.guard is not None
        numbers = self.data.pick(self.order, self.guard.spend(self.gate))
        return numbers, self.order.cursor

    def _send_update(self, snapshot: Snapshot) -> None:
        """The update of a round whose snapshot is on disk, and the wait until the merge is durable."""
        if self.stop():  # else it would wait for everybody first
            raise PausedError(in_round=True)
        round_ = snapshot.round
        weights = self.ends.weights()
        shared = {name: weights[name] for name in self.ends.shared}
        digest = self.sharing.send(round_, shared)
        if round_ == 0 and self.gate.keepsakes.chosen:
            self.gate.keepsakes.keep_head(shared.get(self.ends.head_name), self.labels)
        self.notary.mark()
        loss = self.link.journal.once(f"loss {round_}", lambda: self.measured.shared)
        answer = self.link.ask(Update(0, 0, round_, snapshot.tokens, digest, loss))
        self.measured.shared = None
        if not isinstance(answer, RoundDurable):
            raise ProtocolError(f"{type(answer).__name__} instead of a merged round")
        if snapshot.correction and not (answer.merged and snapshot.tokens):
            self._take_correction_back(snapshot)  # the server's side of the strategy does not know of this round
        self._take_merge_in_time(answer.weights)
        assert self.count is not None
        taken = self.count.tally.rounds_taken + answer.merged
        self.count.set_rounds(self.link.journal.once(f"taken {round_}", lambda: taken))
        self._say("round_durable", round=round_, merged=answer.merged)

    def _take_correction_back(self, snapshot: Snapshot) -> None:
        """To what it was before the round of ``snapshot``, on disk too: as after a kill, this may be done twice."""
        before = self.store.before(snapshot.round)
        correction = {} if before is None or before.terms != snapshot.terms else before.correction
        self.ends.load_correction_tensors(correction)
        self.store.save(replace(snapshot, correction=correction))

    def _snapshot(self, round_: int, step: int, tokens: int) -> Snapshot:
        cut = (self.cut.n_bottom, self.cut.n_top)
        weights, moments = self.ends.weights(), self.ends.optimizer_tensors()
        place = (round_, step, tokens, self.order.cursor, cut)
        return Snapshot(*place, weights, moments, self.terms.sha256, self.ends.correction_tensors())

    def _stop_if_asked(self, step: int | None, tokens: int) -> None:
        """On Ctrl-C: save where we are, so that the next start goes on here. Raises PausedError."""
        if not (self.stop() or (step is None and (self.only_finish or self._is_plan_over()))):
            return
        self.notary.settle()  # a journal begins with nothing unanswered
        if self.link.journal.doing_again:  # it goes further than this
            raise PausedError(in_round=True)
        if step is not None:
            self._begin_journal(self.store.save_pause(self._snapshot(self.round, step, tokens)), in_round=True)
        raise PausedError(in_round=step is not None)

    def _is_plan_over(self) -> bool:
        more_rounds = self.round + 1 < self.settings.rounds.count
        return more_rounds and not self.link.journal.doing_again and self.wants_plan(self.link)

    # -- measuring and the end ---------------------------------------------------------------------------------

    def _evaluate(self, round_: int) -> None:
        """Loss on the held-out rows with the weights that ``round_`` starts from."""
        if not (self.evaluation and due(self.settings, round_)):
            return
        journal = self.link.journal
        try:
            loss = self.measured.measure(self.trainer, self.gate, journal, round_, self.evaluation)
            self.notary.mark()
            facts = self.measured.add(round_, loss)
        except (MissedStepError, NumericalError) as error:  # weights that overflow must not end the federation
            self._say("evaluation_failed", round=round_, reason=str(error))
            return
        self._say("evaluation", **facts)

    def _finish(self, finished: Finished) -> dict[str, Any]:
        self.sharing.take(finished.weights)
        self._evaluate(finished.round + 1)
        path = self.store.save_merged({name: tensor.contiguous() for name, tensor in self.ends.weights().items()})
        personal = self._personal_loss(finished.round)
        self.store.save_closing(self._closing(finished, path, personal, None))  # kept, whatever happens from here on
        report = self._closing(finished, path, personal, self._baselines())
        self.store.save_closing(report)
        self.notary.settle()
        self._say_goodbye()
        self.link.journal.drop()
        return report

    def _closing(
        self, finished: Finished, path: Path, personal: float | None, baselines: Baselines | None
    ) -> dict[str, Any]:
        """The closing report."""
        assert self.count is not None
        assert self.guard is not None
        tally = self.count.tally
        return {
            "client": self.name,
            "federation": self.settings.name,
            "rounds": finished.round + 1,
            "rounds_taken": tally.rounds_taken,
            "starts": tally.starts,
            "uncounted_starts": tally.uncounted_starts,
            "cut": str(self.cut),
            "share": self.settings.merge.share,
            "held_out_losses": self.measured.losses,
            "personal": personal,
            "baselines": None if baselines is None else {**asdict(baselines), "earned": baselines.earned},
            "data": self._data_facts(),
            "bytes": self.count.total_traffic(),
            "privacy": self.guard.report(self.gate),
            "weights": str(path),
            "seconds": time.monotonic() - self.started,
        }

    def _personal_loss(self, round_: int) -> float | None:
        """Held-out loss of this client's own weights as they were before the merge of ``round_``, on the merged trunk.

        None when it had no part in that round, nothing of it is merged, or its activations would be charged anew. The
        ends hold those weights afterwards.
        """
        charged = self.gate.policy.private and self.ends.bottom_trains and not self.ends.trunk_is_empty
        if round_ not in self.store.rounds() or not (self.evaluation and self.ends.shared) or charged:
            return None
        self.ends.load_weights(self.store.weights_after(round_))
        try:
            loss = self.trainer.evaluate(round_ + 1, self.evaluation).mean
        except (MissedStepError, NumericalError):
            return None
        self.notary.mark()
        return loss if math.isfinite(loss) else None

    def _baselines(self) -> Baselines | None:
        """What this client would have reached without the split; None where that is not asked for."""
        ends_too, top_too = wanted(self.settings, self.cut)
        if not (self.evaluation and self.measured.losses and (ends_too or top_too)) or self.ends.trunk_is_empty:
            return None
        assert self.count is not None
        measured = (self.data, self.evaluation, self.link, self.gate)
        taken = self.count.tally.rounds_taken
        fresh = partial(self._fresh_ends, self.settings.alone)
        run = BaselineRun(self.name, taken, *measured, fresh, self._say_baseline)
        self._say("baselines")
        ends_only, top_only = run.ends_only() if ends_too else None, run.top_only() if top_too else None
        return Baselines(self.measured.losses[-1]["loss"], ends_only, top_only, run.steps)

    def _say_baseline(self, which: str, step: int, steps: int) -> None:
        assert self.count is not None
        self._say("baseline_step", which=which, step=step, steps=steps, **self.count.traffic())

    def _say_goodbye(self) -> None:
        """Tell the server that it need not stay for us; all is on disk, so it does not matter whether it hears."""
        with contextlib.suppress(SplitFLError, TimeoutError):
            self.link.request(Bye(0, 0, "finished")).result(timeout=GOODBYE_S)


def told(batches: Sequence[Batch]) -> int:
    """Tokens of a step as the server is told."""
    return sum(batch.told_tokens for batch in batches)
