"""The compute queue: which micro-batches run together, in what order, and when the trunk steps.

The engine lives on the event loop and never computes there: one thread runs the trunk. One optimizer step is in
work at a time; a request for the next one waits until it is applied. In ``client-batch`` mode a step belongs to
all clients of the round, and their micro-batches run as one batch through the blocks that they share; in
``sequential`` mode it belongs to one client after another. A joint forward is one graph: its backward runs once, when
every client in it has delivered or was dropped. Forwards wait for room (tokens whose graphs are held); a backward
never does. With ``trunk.recompute`` no graph is held: the backward runs the forward again, and what waits for a client
that computes is its inputs alone.

The optimizer runs behind the last reply, while clients compute; but where they all come over loopback, to a trunk that
takes every core, it waits until somebody asks for the trunk again. Two that compute on the same cores hold each other
up at every barrier of their threads, which takes longer than one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from server_model.steps import Arrival, Joint, MissedError, StepKey, StepWork
from server_model.tasks import done, fail, resolve, spawn
from server_model.threads import computing_thread
from server_model.trunk import Graph, Rows, Trunk
from splitfl.config import Federation
from splitfl.errors import ProtocolError
from splitfl.federation.schedule import learning_rate

log = logging.getLogger("splitfl.server.engine")
T = TypeVar("T")


class Engine:
    """Serves forwards and backwards of the open round, computing with ``threads`` (0: as many as torch would take).

    All methods run on the event loop.
    """

    def __init__(self, trunk: Trunk, settings: Federation, threads: int = 0) -> None:
        self.trunk = trunk
        self.settings = settings
        self.round = -1
        self.cohort: dict[str, int] = {}  # client -> the micro-batches that it computes a step in
        self.neighbours: frozenset[str] = frozenset()  # clients that come over loopback
        self.next_step: dict[str, int] = {}  # client -> the step it is expected at
        self.work: StepWork | None = None
        self.due: StepWork | None = None  # applied before anything else is computed
        self.waiting: list[Arrival] = []
        self.tokens_held = 0
        self.steps_applied = 0
        cores = torch.get_num_threads()  # as many as torch would take
        self._takes_all_cores = trunk.device.type == "cpu" and (threads or cores) >= cores
        self._thread = computing_thread("trunk", threads or cores)

    # -- rounds ------------------------------------------------------------------------------------------------

    def open_round(self, round_: int, cohort: Mapping[str, int], neighbours: Iterable[str] = ()) -> None:
        """Serve ``round_`` from step 0 for ``cohort``: who trains through the trunk, and in how many micro-batches.

        ``neighbours``: those of them that come over loopback.
        """
        self.end_round()
        self.round = round_
        self.cohort = dict(cohort)
        self.neighbours = frozenset(neighbours)
        self.next_step = dict.fromkeys(self.cohort, 0)
        self.queue(lambda: self.trunk.round_tokens.clear())  # behind whatever the last round still runs
        self._advance()

    def end_round(self) -> None:
        """Nobody is in the round any more; a step that was not finished is void, and its clients miss it."""
        self.cohort = {}
        self._refuse_waiting(lambda arrival: arrival.train)
        work, self.work = self.work, None
        if work is not None and not work.applying:
            self._void(work)

    def _void(self, work: StepWork) -> None:
        """A step that will not be finished: whoever waits for an answer misses it, and its gradients are forgotten."""
        if work.timer is not None:
            work.timer.cancel()
        for joint in work.joints:
            for member in joint.members:
                self._refuse(member.reply)
                self._refuse(joint.replies.get(member.client))
            self._release(joint)
        self.queue(self.trunk.clear)  # behind whatever of it still runs

    def leave_round(self, client: str) -> None:
        """A client is out of this round: its update came, or it has gone. Others stop waiting for it."""
        self.cohort.pop(client, None)
        self._refuse_waiting(lambda arrival: arrival.client == client and arrival.train)
        self.drop(client)

    def drop(self, client: str) -> None:
        """Take a client out of the step in work; it may go on with the next one."""
        work = self.work
        if work is not None and client in work.members and not work.applying:
            self._refuse_waiting(lambda a: a.client == client and a.train and a.key.step <= work.step)
            self.next_step[client] = work.step + 1
            work.members.pop(client)
            for joint in work.joints:
                if any(member.client == client for member in joint.members):
                    joint.gradients.setdefault(client, None)
                    self._refuse(joint.replies.pop(client, None))
        self._advance()

    def sit_out(self, client: str, step: int) -> None:
        """A client skips ``step``, and any before it that it has not finished, on its own account."""
        self._refuse_waiting(lambda a: a.client == client and a.train and a.key.step <= step)
        if self.work is not None and self.work.step <= step:
            self.drop(client)
        self.next_step[client] = max(self.next_step.get(client, 0), step + 1)
        self._advance()

    # -- requests ----------------------------------------------------------------------------------------------

    async def forward(self, client: str, key: StepKey, blocks: range, rows: Rows, tokens: int, train: bool) -> Tensor:
        """Trunk output for one micro-batch. Raises MissedError when the client is not part of that step."""
        if train and (not self._expected(client, key) or self._is_here(client, key)):
            raise MissedError
        if train and key.micro != self._micros_come(client, key):
            raise ProtocolError(f"micro-batch {key.micro} before those that come first", field="micro")
        if train and key.step > self._first_open_step(client):
            self.sit_out(client, key.step - 1)
        reply: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.waiting.append(Arrival(client, key, blocks, rows, tokens, train, reply))
        self._advance()
        return await reply

    async def backward(self, client: str, key: StepKey, gradient: Tensor) -> Tensor:
        """Gradient at the trunk's input for one micro-batch. Raises MissedError when its forward is gone."""
        joint = self._joint_of(client, key)
        if joint is None or client in joint.gradients:
            raise MissedError
        member = next(member for member in joint.members if member.client == client)
        if gradient.shape != member.rows.hidden.shape:
            given, wanted = tuple(gradient.shape), tuple(member.rows.hidden.shape)
            raise ProtocolError(f"gradient {given} for activations {wanted}", field="gradient")
        reply: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        joint.gradients[client] = gradient
        joint.replies[client] = reply
        self._advance()
        return await reply

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run ``function`` on the compute thread, behind what is queued there."""
        self._apply_due()
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def queue(self, function: Callable[[], None]) -> None:
        """Put ``function`` behind what is queued on the compute thread, before anything that comes later."""
        self._apply_due()
        spawn(done(asyncio.wrap_future(self._thread.submit(function))))

    def close(self) -> None:
        """Stop the compute thread and refuse what waits."""
        self._refuse_waiting(lambda _: True)
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- scheduling --------------------------------------------------------------------------------------------

    def _expected(self, client: str, key: StepKey) -> bool:
        current = self.work is not None and client in self.work.members and key.step == self.work.step
        ahead = key.step >= self.next_step.get(client, 0)
        return key.round == self.round and client in self.cohort and (current or ahead)

    def _is_here(self, client: str, key: StepKey) -> bool:
        """Whether this micro-batch has come already."""
        waits = any(a.client == client and a.key == key and a.train for a in self.waiting)
        return waits or self._joint_of(client, key) is not None

    def _micros_come(self, client: str, key: StepKey) -> int:
        """How many micro-batches of that step have come from this client: the number of its next one."""
        keys = {a.key for a in self.waiting if a.client == client and a.train}
        if self.work is not None and (self.work.round, self.work.step) == (key.round, key.step):
            keys |= {m.key for joint in self.work.joints for m in joint.members if m.client == client}
        return sum((k.round, k.step) == (key.round, key.step) for k in keys)

    def _first_open_step(self, client: str) -> int:
        """The earliest step to which this client still owes something."""
        work, expected = self.work, self.next_step[client]
        if work is None or work.step != expected or client not in work.members:
            return expected
        delivered = sum(joint.gradients.get(client) is not None for joint in work.joints)
        return expected + (delivered >= work.members[client])

    def _joint_of(self, client: str, key: StepKey) -> Joint | None:
        work = self.work
        if work is None or (work.round, work.step) != (key.round, key.step):
            return None
        for joint in work.joints:
            if any(member.client == client and member.key == key for member in joint.members):
                return joint
        return None

    def _advance(self) -> None:
        """Start whatever can be started now."""
        if self.waiting:
            self._apply_due()
        self._run_evaluations()
        self._begin_step()
        if self.work is not None and not self.work.applying:
            self._run_forwards(self.work)
            self._run_backwards(self.work)
            self._finish_step(self.work)

    def _run_evaluations(self) -> None:
        """Forwards without a graph pass as they come; they change nothing and hold no memory."""
        for arrival in [arrival for arrival in self.waiting if not arrival.train]:
            self.waiting.remove(arrival)
            self._launch(self._judge(arrival), [arrival])

    def _begin_step(self) -> None:
        """When no step is in work and somebody waits, begin the next one."""
        arrivals = [arrival for arrival in self.waiting if arrival.train]
        if self.work is not None or not arrivals:
            return
        if self.settings.trunk.mode == "sequential":
            members, step = [arrivals[0].client], arrivals[0].key.step
        else:
            step = min(self.next_step[client] for client in self.cohort)
            members = [client for client in self.cohort if self.next_step[client] == step]
        self.work = StepWork(self.round, step, {client: self.cohort[client] for client in members})
        self._set_timer(self.work)

    def _set_timer(self, work: StepWork) -> None:
        limit = self.settings.trunk.step_deadline_s
        if limit:
            work.timer = asyncio.get_running_loop().call_later(limit, self._deadline, work)

    def _deadline(self, work: StepWork) -> None:
        """Drop whoever has not delivered in time; the others get as long again for what is left."""
        if self.work is not work or work.applying:
            return
        for client in sorted(client for client in work.members if not self._is_owed(work, client)):
            log.warning("round %d step %d: %s missed the deadline", work.round, work.step, client)
            self.drop(client)
        self._set_timer(work)

    def awaited(self) -> set[str] | None:
        """Whose turn it is in the step in work; None between steps."""
        work = self.work
        if work is None or work.applying:
            return None
        return {client for client in work.members if not self._is_owed(work, client)}

    def holding_up(self) -> frozenset[str]:
        """Those whom others wait for, in the step in work or to begin theirs."""
        awaited = self.awaited()
        if self.work is None or awaited is None:
            return frozenset()
        others = self.work.members.keys() | {arrival.client for arrival in self.waiting if arrival.train}
        return frozenset(awaited if others - awaited else ())

    def _is_owed(self, work: StepWork, client: str) -> bool:
        """Whether it is not this client's turn: it waits for an answer, or has finished."""
        asked = any(arrival.client == client and arrival.train for arrival in self.waiting)
        running = any(m.client == client and not m.reply.done() for joint in work.joints for m in joint.members)
        replies = [joint.replies[client] for joint in work.joints if client in joint.replies]
        delivered = any(not reply.done() for reply in replies)
        return asked or running or delivered or work.has_finished(client)

    def _run_forwards(self, work: StepWork) -> None:
        """Launch each micro-batch that all have brought, or of which memory takes no more."""
        mine = [a for a in self.waiting if a.train and a.client in work.members and a.key.step == work.step]
        groups: dict[int, list[Arrival]] = {}
        for arrival in sorted(mine, key=lambda arrival: arrival.client):
            groups.setdefault(arrival.key.micro, []).append(arrival)
        for micro, group in groups.items():
            fitting, full = self._fit(group)
            if fitting and (full or self._nobody_else_comes(work, micro, group)):
                self._start_forward(work, fitting)

    def _fit(self, group: list[Arrival]) -> tuple[list[Arrival], bool]:
        """The part of a group that may run now, and whether memory cut it short. One client always fits alone.

        A group that runs again in its backward has its graph then, so it is no larger either.
        """
        room = self.settings.trunk.max_tokens_in_flight - self.tokens_held
        fitting: list[Arrival] = []
        for arrival in group:
            if arrival.tokens > room and (fitting or self.tokens_held):
                return fitting, True
            fitting.append(arrival)
            room -= arrival.tokens
        return fitting, False

    def _nobody_else_comes(self, work: StepWork, micro: int, group: list[Arrival]) -> bool:
        """Whether every member that has this micro-batch has it behind it, or in this group."""
        owing = {client for client, count in work.members.items() if micro < count}
        return all(self._has_micro(work, client, micro) for client in owing - {arrival.client for arrival in group})

    def _has_micro(self, work: StepWork, client: str, micro: int) -> bool:
        return any(m.client == client and m.key.micro == micro for joint in work.joints for m in joint.members)

    def _start_forward(self, work: StepWork, group: list[Arrival]) -> None:
        for arrival in group:
            self.waiting.remove(arrival)
        keep_graph = not self.settings.trunk.recompute
        joint = Joint(group, sum(arrival.tokens for arrival in group) if keep_graph else 0)
        self.tokens_held += joint.tokens_held
        work.joints.append(joint)

        async def run() -> list[Tensor]:
            outputs, graph = await self.call(self._forward_now, group, keep_graph)
            joint.has_run = True
            joint.graph = None if joint.finished else graph  # the round may have ended meanwhile
            return outputs

        self._launch(run(), group, joint)

    async def _judge(self, arrival: Arrival) -> list[Tensor]:
        outputs, _ = await self.call(self._forward_now, [arrival], False)
        return outputs

    def _forward_now(self, group: list[Arrival], keep_graph: bool) -> tuple[list[Tensor], Graph | None]:
        return self.trunk.forward([a.blocks for a in group], [a.rows for a in group], keep_graph=keep_graph)

    def _launch(self, work: Any, group: list[Arrival], joint: Joint | None = None) -> None:
        """Await a forward in the background and hand out its outputs, or its failure."""

        async def run() -> None:
            try:
                outputs = await work
            except Exception as error:  # noqa: BLE001 - whatever torch raises belongs to the requests
                for arrival in group:
                    fail(arrival.reply, error)
                if joint is not None:
                    self._release(joint)
                    for arrival in group:
                        self.drop(arrival.client)
            else:
                for arrival, output in zip(group, outputs, strict=True):
                    resolve(arrival.reply, output)
            self._advance()

        spawn(run())

    def _run_backwards(self, work: StepWork) -> None:
        """One backward for each joint graph whose clients have all delivered or gone."""
        for joint in work.joints:
            if joint.has_run and joint.complete and not joint.backward_started:
                joint.backward_started = True
                spawn(self._backward(work, joint))

    async def _backward(self, work: StepWork, joint: Joint) -> None:
        delivered = [member for member in joint.members if joint.gradients[member.client] is not None]
        try:
            if delivered:
                inputs = await self.call(self._backward_now, joint, delivered)
                for member, gradient in zip(delivered, inputs, strict=True):
                    resolve(joint.replies.get(member.client), gradient)
        except Exception as error:  # noqa: BLE001
            for reply in joint.replies.values():
                fail(reply, error)
            self._give_up(work)
        for member in joint.members:
            work.done[member.client] = work.done.get(member.client, 0) + 1
        self._release(joint)
        self._advance()

    def _give_up(self, work: StepWork) -> None:
        """A backward failed: what has accumulated is part of a step, so its members go on with the next one."""
        if self.work is not work:
            return
        self.work = None
        self._refuse_waiting(lambda a: a.train and a.client in work.members and a.key.step <= work.step)
        for client in work.members:
            self.next_step[client] = work.step + 1
        self._void(work)

    def _backward_now(self, joint: Joint, delivered: list[Arrival]) -> list[Tensor]:
        """On the compute thread: gradients at the inputs of those who delivered.

        They run anew where no graph was kept, and where rows of a dropped client that overflowed would make NaN of its
        zero gradients.
        """
        if joint.finished:
            raise MissedError  # its round ended while this was on its way
        graph, members = joint.graph, joint.members
        if graph is None or (len(delivered) < len(members) and not graph.outputs.isfinite().all()):
            _, graph = self._forward_now(delivered, True)
            members = delivered
            assert graph is not None
        gradients = [joint.gradients[member.client] for member in members]
        inputs = self.trunk.backward(graph, gradients, [member.label_tokens for member in members])
        return [gradient for member, gradient in zip(members, inputs, strict=True) if member in delivered]

    def _release(self, joint: Joint) -> None:
        """A joint forward is over, one way or another: its room is free."""
        if not joint.finished:
            joint.finished, joint.graph = True, None
            self.tokens_held -= joint.tokens_held

    def _finish_step(self, work: StepWork) -> None:
        """Step the trunk when every member has delivered every micro-batch; replies have gone out before."""
        unfinished = [joint for joint in work.joints if not joint.finished]
        if unfinished or not all(work.has_finished(client) for client in work.members):
            return
        work.applying = True
        if work.timer is not None:
            work.timer.cancel()
        for client in work.members:
            self.next_step[client] = work.step + 1
        self.due = work
        if self.waiting or not self._shares_cores(work):
            self._apply_due()

    def _shares_cores(self, work: StepWork) -> bool:
        """Whether, as far as one can tell, the trunk and all whom it has just answered compute on the same cores."""
        return self._takes_all_cores and bool(work.members) and self.neighbours.issuperset(work.members)

    def _apply_due(self) -> None:
        """Put the step that is due, if one is, on the compute thread."""
        work, self.due = self.due, None
        if work is not None:
            rate = learning_rate(self.settings, work.round, work.step)
            spawn(self._apply(work, asyncio.wrap_future(self._thread.submit(self.trunk.step, rate))))

    async def _apply(self, work: StepWork, step: asyncio.Future[float]) -> None:
        try:
            norm = await step
            if not math.isfinite(norm):
                log.warning("round %d step %d: gradient norm %s, trunk left as it was", work.round, work.step, norm)
            self.steps_applied += 1
        finally:
            if self.work is work:
                self.work = None
            self._advance()

    # -- refusals ----------------------------------------------------------------------------------------------

    def _refuse_waiting(self, unwanted: Callable[[Arrival], bool]) -> None:
        for arrival in [arrival for arrival in self.waiting if unwanted(arrival)]:
            self.waiting.remove(arrival)
            self._refuse(arrival.reply)

    def _refuse(self, reply: asyncio.Future[Tensor] | None) -> None:
        fail(reply, MissedError())
