"""The rounds as the trunk service lives them: who waits for what, when to merge, and durability.

``splitfl.federation.rounds`` decides; here its decisions meet weights and disk. A round is durable when its folder
is on disk; only then is any client told, and only then may it forget older states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ParamSpec, TypeVar

from torch import Tensor

from server_model.blobs import Blobs
from server_model.disk import once_there_is_room
from server_model.engine import Engine
from server_model.members import Member, Members
from server_model.merge import Aggregator
from server_model.store import RoundState, Store
from server_model.tasks import resolve, spawn
from server_model.updates import ClientUpdate, Inbox
from splitfl.config import Federation
from splitfl.errors import ConfigError, RefusedError, StorageError
from splitfl.federation.merging import TOO_FEW
from splitfl.federation.rounds import Action, Finish, LateUpdate, LeaveSteps, MergeRound, OpenRound, Phase, RoundMachine
from splitfl.split.checkpoint import CheckpointFolder, file_entries
from splitfl.split.flow import trunk_needs_backward
from splitfl.wire.messages import Answer, Finished, NextRound, RoundDurable, RoundOpen, Update

Say = Callable[..., None]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Desk:
    """Answers that clients wait for, by name: their next round, and what became of their update."""

    next_round: dict[str, asyncio.Future[Answer]] = field(default_factory=dict)
    update: dict[str, asyncio.Future[Answer]] = field(default_factory=dict)

    def cancel(self, client: str) -> None:
        """Nobody waits for these answers any more."""
        for waiting in (self.next_round, self.update):
            future = waiting.pop(client, None)
            if future is not None:
                future.cancel()


class Rounds:
    """Runs the rounds of one federation from its store. ``clock`` gives seconds; ``say`` reports events."""

    def __init__(
        self,
        settings: Federation,
        source: CheckpointFolder,
        store: Store,
        engine: Engine,
        blobs: Blobs,
        *,
        clock: Callable[[], float],
        say: Say,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.layers: int = source.config.num_hidden_layers
        self.store = store
        self.engine = engine
        self.blobs = blobs
        self.clock = clock
        self.say = say
        self.make_room = make_room
        self.inbox = Inbox(store.uploads)
        self.machine = RoundMachine(settings, 0)
        self.aggregator = Aggregator(settings, source, store, engine.trunk)
        self.weights = ""  # hash of the list of merged tensors
        self.durable = -1  # the newest round on disk
        self.finished = asyncio.Event()
        self._held_up: dict[object, str] = {}  # what keeps each write that has to wait from the disk
        self._desk = Desk()
        self._opened = -1  # the newest round that was opened
        self._rings_at: float | None = None  # the deadline that is set
        self._updates: dict[str, ClientUpdate] = {}
        self._late: dict[str, ClientUpdate] = {}  # for the next merge; a restart forgets them

    def restore(self) -> None:
        """Go back to the newest durable round, if there is one."""
        rounds = self.store.durable_rounds()
        if not rounds:
            return
        state = self.store.load(rounds[-1])
        check_fits(state, self.engine.trunk.weights())
        self._load_trunk(state)
        self.aggregator.restore(state)
        self.durable = state.round
        self._offer_weights(state.round)
        self.machine = RoundMachine(self.settings, state.round + 1)
        if self.machine.phase is Phase.FINISHED:
            self.finished.set()

    def _load_trunk(self, state: RoundState) -> None:
        self.engine.trunk.load_weights(state.trunk)
        self.engine.trunk.optimizer.load_state_tensors(state.optimizer)

    def _roll_back(self) -> None:
        """On the compute thread: forget what an abandoned round did to the trunk."""
        self.engine.trunk.clear()
        if self.durable < 0:
            self.engine.trunk.reset()
        else:
            self._load_trunk(self.store.load(self.durable))

    def _offer_weights(self, round_: int) -> None:
        folder = self.store.folder_of(round_)
        sent = tuple(f"/{name}" for name in self.aggregator.strategy.sent_names)
        remembered = file_entries(folder / "strategy.safetensors")
        entries = file_entries(folder / "merged.safetensors")
        entries += [entry for entry in remembered if entry.name.endswith(sent)]
        self.weights = self.blobs.add_round(folder, ((entry.name, entry) for entry in entries))

    # -- what clients ask --------------------------------------------------------------------------------------

    async def next_round(self, members: Members, member: Member, request: NextRound) -> Answer:
        """RoundOpen when this client is in a cohort, or Finished."""
        if self.machine.phase is Phase.FINISHED:
            return Finished(request.seq, self.durable, self.weights)
        if member.name in self._desk.next_round:
            raise RefusedError(
                "this client waits for its next round already", "Wait for that answer.", code="wrong_round"
            )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._desk.next_round[member.name] = future
        self.engine.leave_round(member.name)
        self._act(members, self.machine.wait(member.name, self.clock()))
        return replace(await future, seq=request.seq)

    async def update(self, members: Members, member: Member, request: Update) -> Answer:
        """RoundDurable once the round is merged and on disk; at once for an update that came too late.

        Raises RefusedError for weights that do not fit, and for a round that this client is not in.
        """
        if member.name in self._desk.update:
            raise RefusedError("this client's update has come already", "Wait for the merge.", code="wrong_round")
        most = self.settings.rounds.local_steps * self.settings.batch.records * self.settings.batch.max_length
        if request.tokens > most:  # they weigh it in the mean
            raise RefusedError(
                f"an update trained on {request.tokens} label tokens, where a round has {most} at most",
                "Train with the settings that the server sent.",
                code="over_limit",
            )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._desk.update[member.name] = future
        try:
            update = await asyncio.to_thread(self.inbox.check, member.name, request, member.shared)
            actions = self._accept(update, request)
        except BaseException:
            self._desk.update.pop(member.name, None)
            raise
        if request.held_out_loss is not None:
            self.say("held_out_loss", client=member.name, round=request.round, loss=request.held_out_loss)
        self.engine.leave_round(member.name)
        self._act(members, actions)
        return replace(await future, seq=request.seq)

    def _accept(self, update: ClientUpdate, request: Update) -> list[Action]:
        try:
            actions = self.machine.update(update.client, request.round, request.tokens, self.clock())
        except RefusedError:
            self.inbox.forget(update)
            raise
        self._updates[update.client] = update
        return actions

    def leave(self, members: Members, member: Member) -> None:
        """A client is gone for good; an update that it has sent still counts."""
        self._desk.cancel(member.name)
        self.inbox.forget_coming(member.name)
        self.engine.leave_round(member.name)
        self._act(members, self.machine.leave(member.name, self.clock()))

    @property
    def progress(self) -> tuple[object, ...]:
        """Changes whenever the federation gets on."""
        return self.machine.round, self.machine.phase, self.engine.steps_applied

    def awaited(self) -> tuple[list[str], int]:
        """Whom the others wait for at this moment, and how many more clients a round needs to open: nobody, while it is
        the disk that holds them up."""
        if self.trouble:
            return [], 0
        in_step = self.engine.awaited()
        return sorted(self.machine.awaited() if in_step is None else in_step), self.machine.missing()

    # -- what the machine decides ------------------------------------------------------------------------------

    def _act(self, members: Members, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case OpenRound():
                    self._open(members, action)
                case LateUpdate():
                    self._take_late(action)
                case MergeRound():
                    self.engine.end_round()
                    spawn(self._merge(members, action, self._to_merge(action)))
                case LeaveSteps():
                    self.say("late_in_step", client=action.client, round=self.machine.round)
                    self.engine.leave_round(action.client)
                case Finish():
                    self._finish(action.round)
        self._ring_at_deadline(members)

    def _open(self, members: Members, action: OpenRound) -> None:
        self.say("round_open", round=action.round, cohort=list(action.cohort))
        if action.round == self._opened:  # everybody left it; those who come start from the last durable one
            self.engine.queue(self._roll_back)
        self._opened = action.round
        cohort = [members.named(name) for name in action.cohort]
        through_trunk = {member.name: member.micro_batches for member in cohort if self._trains_through_trunk(member)}
        neighbours = [member.name for member in cohort if member.loopback]
        self.engine.open_round(action.round, through_trunk, neighbours)
        for name in action.cohort:
            resolve(self._desk.next_round.pop(name, None), RoundOpen(0, action.round, self.weights))

    def _ring_at_deadline(self, members: Members) -> None:
        """Once for each deadline that is set."""
        deadline = self.machine.deadline()
        if deadline is not None and deadline != self._rings_at:
            asyncio.get_running_loop().call_later(max(0.0, deadline - self.clock()), self._ring, members, deadline)
        self._rings_at = deadline

    def _ring(self, members: Members, deadline: float) -> None:
        """A deadline that changed nothing rings again after as long: somebody may hold the others up by then."""
        self._act(members, self.machine.tick(self.clock(), self.engine.holding_up()))
        if self.machine.deadline() == deadline:
            limit = self.settings.rounds.deadline_s
            asyncio.get_running_loop().call_later(limit, self._ring, members, deadline)

    def _trains_through_trunk(self, member: Member) -> bool:
        return trunk_needs_backward(self.settings, member.cut, self.layers)

    def _take_late(self, late: LateUpdate) -> None:
        """Its client goes on with the newest merge. It hears "not merged": until the next one nothing is durable."""
        update = self._updates.pop(late.client)
        if late.kept:
            self._late[late.client] = update
        else:
            self.inbox.forget(update)
        self.say("late_update", client=late.client, round=late.round, kept=late.kept)
        answer = RoundDurable(0, self.durable, self.weights, merged=False)
        resolve(self._desk.update.pop(late.client, None), answer)

    def _to_merge(self, action: MergeRound) -> list[ClientUpdate]:
        """The updates of a merge, those in time first. What comes late from here on is for the merge after it."""
        in_time = [self._updates.pop(name) for name in action.contributors]
        there, self._late = self._late, {}
        began = self.aggregator.at_start_of
        late = [
            replace(there.pop(late.client), discount=late.discount, start=partial(began, late.round))
            for late in action.late
        ]
        for superseded in there.values():
            self.inbox.forget(superseded)
        return in_time + late

    async def _merge(self, members: Members, action: MergeRound, updates: list[ClientUpdate]) -> None:
        """Merge, make it durable, tell everybody."""
        state, refused = await self.engine.call(self.aggregator.merge, action.round, updates)
        for reason in sorted(set(refused.values())):
            names = [name for name in refused if refused[name] == reason]
            self.say("merge_refused", round=action.round, tensors=names, reason=reason)
        merged = () if TOO_FEW in refused.values() else action.contributors
        await self._save(state)
        await asyncio.to_thread(self._offer_weights, action.round)
        self.durable = action.round
        for folder in await asyncio.to_thread(self.store.prune):
            self.blobs.forget_round(folder)
        for update in updates:
            self.inbox.forget(update)
        late = [update.client for update in action.late]
        self.say("round_durable", round=action.round, clients=list(merged), late=late)
        done, self._desk.update = self._desk.update, {}
        for name, future in done.items():
            resolve(future, RoundDurable(0, action.round, self.weights, merged=name in merged))
        self._act(members, self.machine.merged(self.clock()))

    async def _save(self, state: RoundState) -> None:
        """Make a round durable."""
        await self.written(self.store.save, state)  # no step moves its tensors while a round merges

    async def written(self, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``write`` returns once there is room on the disk; till then the operator hears. Raises StorageError."""
        key = object()
        try:
            return await once_there_is_room(partial(self._wait_for_room, key), write, *args, **kwargs)
        finally:
            self._held_up.pop(key, None)

    def _wait_for_room(self, key: object, error: StorageError, full: bool) -> None:
        """The disk is full, and what can be had again makes room; or it is away."""
        self._held_up[key] = str(error)
        if full:
            self.make_room()
        self.say("storage_error", round=self.machine.round, error=str(error))

    @property
    def trouble(self) -> str:
        """What keeps a write from the disk, "" while all goes well."""
        return next(iter(self._held_up.values()), "")

    def _finish(self, round_: int) -> None:
        self.say("finished", round=round_)
        for future in self._desk.next_round.values():
            resolve(future, Finished(0, round_, self.weights))
        self._desk.next_round.clear()
        self.finished.set()


def check_fits(state: RoundState, trunk: dict[str, Tensor]) -> None:
    """Raise ConfigError when a durable round is not one of this model with these settings."""
    odd = state.trunk.keys() ^ trunk.keys()
    odd |= {name for name in state.trunk.keys() & trunk.keys() if state.trunk[name].shape != trunk[name].shape}
    if odd:
        raise ConfigError(
            f"round {state.round + 1} in the state folder is not of this model: {min(odd)}",
            "Name the model folder that the federation was begun with, or a new --state.",
        )
