"""The trunk service without its sockets: sessions, the engine, rounds and durability, request by request.

The websocket shell and the in-process lab both feed it; everything runs on one event loop, and torch runs on the
engine's thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from server_model.blobs import Blobs, tensor_list
from server_model.engine import Engine, MissedError, StepKey, spawn
from server_model.store import RoundState, Store
from server_model.trunk import Rows, Trunk
from server_model.updates import HEADER_ALLOWANCE, ClientUpdate, Inbox, merge_updates
from splitfl.codec.tensors import decode_tensor, encode_tensor
from splitfl.config import Federation
from splitfl.errors import ConfigError, NumericalError, ProtocolError, RefusedError, SplitFLError, StorageError
from splitfl.federation.rounds import Action, Finish, MergeRound, OpenRound, Phase, RoundMachine
from splitfl.federation.strategies import STRATEGIES, Contribution
from splitfl.split.checkpoint import CheckpointFolder, file_entries, is_tied
from splitfl.split.cut import Cut
from splitfl.split.export import COPIED_FILES
from splitfl.split.modes import bottom_trains, training_policy
from splitfl.split.shares import Shapes, ends_names, shared_shapes
from splitfl.split.training import check_policy, stays_tied
from splitfl.wire.messages import (
    Answer,
    Backward,
    Bye,
    Chunk,
    ErrorCode,
    Failed,
    Farewell,
    Fetch,
    Finished,
    Forward,
    Gradient,
    Hello,
    Hidden,
    NextRound,
    Request,
    RoundDurable,
    RoundOpen,
    SitOut,
    StepMissed,
    TensorBytes,
    Update,
    Upload,
    Uploaded,
    Welcome,
)
from splitfl.wire.session import ServerSession, choose_version

log = logging.getLogger("splitfl.server")


@dataclass
class Member:
    """One client's session: it outlives its connections by the grace period."""

    name: str
    token: str
    cut: Cut
    wire: ServerSession
    connected: bool = True
    expiry: asyncio.TimerHandle | None = None
    shared: Shapes = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True)
class Progress:
    """Something an operator wants to see; the shell prints it."""

    event: str
    facts: dict[str, object]


class Coordinator:
    """Serves one federation from ``model`` with its state in ``state``."""

    def __init__(
        self,
        model: Path,
        settings: Federation,
        state: Path,
        *,
        device: torch.device,
        resume: bool = False,
        report: Callable[[Progress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.source = CheckpointFolder(model)
        self.layers: int = self.source.config.num_hidden_layers
        self.device = device
        self.report = report
        self.clock = clock
        self._check_settings()
        self.store = Store(state)
        self.store.begin(model, settings, resume=resume)
        self.inbox = Inbox(self.store.uploads)
        self.trunk = Trunk(settings, self.source, range(settings.bottoms[0], self.layers - settings.tops[0]), device)
        self.engine = Engine(self.trunk, settings)
        self.blobs = Blobs()
        self.manifest = self._offer_assets()
        self.incarnation = secrets.token_hex(8)
        self.members: dict[str, Member] = {}  # by token
        self._shared: dict[Cut, Shapes] = {}
        self.merged: dict[str, Tensor] = {}
        self.weights = ""  # hash of the list of merged tensors
        self.durable = -1
        self.machine = RoundMachine(settings, 0)
        if resume:
            self._restore()
        self.finished = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[Answer]] = {}  # client -> its NextRound
        self._updates: dict[str, ClientUpdate] = {}
        self._updating: dict[str, asyncio.Future[Answer]] = {}  # client -> its Update
        if self.machine.phase is Phase.FINISHED:
            self.finished.set()

    # -- start -------------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        self.settings.check_layers(self.layers)
        policy = training_policy(self.settings, self.layers, self.device)
        check_policy(policy, tied=is_tied(self.source.config))
        if stays_tied(self.source.config, policy) and self.settings.merge.share == "top":
            raise ConfigError(
                'merge.share = "top" on a model whose head is its embedding, and both train',
                'Set merge.share = "ends", or freeze the embedding with model.freeze_below = 1 or more.',
            )

    def _offer_assets(self) -> str:
        """Offer config, tokenizer and every tensor a client may hold; returns the hash of their list."""
        folder = self.source.folder
        names = [name for name in ("config.json", *COPIED_FILES) if (folder / name).is_file()]
        files = {}
        for name in names:
            data = (folder / name).read_bytes()
            files[name] = {"sha256": self.blobs.add_bytes(data), "nbytes": len(data)}
        deepest = Cut(self.settings.bottoms[-1], self.settings.tops[-1])
        wanted = ends_names(self.source.config, deepest)
        tensors = self.blobs.add_tensors((name, self.source.entries[name]) for name in wanted)
        return self.blobs.add_bytes(json.dumps({"files": files, "tensors": tensors}, sort_keys=True).encode())

    def _restore(self) -> None:
        """Go back to the newest durable round."""
        rounds = self.store.durable_rounds()
        if not rounds:
            return
        state = self.store.load(rounds[-1])
        self.trunk.load_weights(state.trunk)
        self.trunk.optimizer.load_state_tensors(state.optimizer)
        self.merged = dict(state.merged)
        self.durable = state.round
        self._offer_weights(state.round)
        self.machine = RoundMachine(self.settings, state.round + 1)

    def _offer_weights(self, round_: int) -> None:
        path = self.store.folder_of(round_) / "merged.safetensors"
        listed = self.blobs.add_tensors((entry.name, entry) for entry in file_entries(path))
        self.weights = self.blobs.add_bytes(tensor_list(listed))

    # -- sessions ----------------------------------------------------------------------------------------------

    def hello(self, hello: Hello) -> tuple[Member, Welcome]:
        """Open or resume a session. Raises ProtocolError or RefusedError; the shell turns them into Refused."""
        version = choose_version(hello)
        known = self.members.get(hello.resume)
        if known is not None and hello.fresh and known.name == hello.name:
            self._forget(known)
            known = None
        resumed = known is not None and known.name == hello.name
        member = known if known is not None and resumed else self._new_member(hello)
        member.connected = True
        if member.expiry is not None:
            member.expiry.cancel()
            member.expiry = None
        self._say("connected", client=member.name, resumed=resumed, cut=str(member.cut))
        return member, Welcome(
            version=version,
            session=member.token,
            resumed=resumed,
            incarnation=self.incarnation,
            round=self.durable,
            n_bottom=member.cut.n_bottom,
            n_top=member.cut.n_top,
            settings=self.settings.model_dump_json(),
            manifest=self.manifest,
        )

    def _new_member(self, hello: Hello) -> Member:
        for other in list(self.members.values()):
            if other.name != hello.name:
                continue
            if other.connected:
                raise RefusedError(
                    f"a client named {hello.name!r} is connected already",
                    "Choose another --name, or stop the other client.",
                    code="name_taken",
                )
            self._forget(other)  # it came back without its state
        cut = self._cut_of(hello)
        member = Member(hello.name, secrets.token_urlsafe(24), cut, ServerSession(), shared=self._shared_of(cut))
        self.members[member.token] = member
        return member

    def _cut_of(self, hello: Hello) -> Cut:
        if hello.n_bottom < 0 or hello.n_top < 0:
            return self.settings.cut
        cut = Cut(hello.n_bottom, hello.n_top)
        if not self.settings.allows(cut) or cut.n_bottom + cut.n_top > self.layers:
            low, high = self.settings.bottoms, self.settings.tops
            raise RefusedError(
                f"cut {cut} is not allowed here (bottom {low[0]} to {low[-1]}, top {high[0]} to {high[-1]}, "
                f"{self.layers} blocks in all)",
                "Choose another --plan, or leave it out.",
                code="bad_cut",
            )
        return cut

    def _shared_of(self, cut: Cut) -> Shapes:
        if cut not in self._shared:
            self._shared[cut] = shared_shapes(self.source.config, self.settings, cut)
        return self._shared[cut]

    def disconnected(self, member: Member) -> None:
        """The connection is gone; the session stays for the grace period."""
        if self.members.get(member.token) is not member:
            return
        member.connected = False
        self._say("disconnected", client=member.name, grace_s=self.settings.trunk.grace_s)
        loop = asyncio.get_running_loop()
        member.expiry = loop.call_later(self.settings.trunk.grace_s, self._forget, member)

    def _forget(self, member: Member) -> None:
        """Drop a session: its client takes part no more until it says Hello anew."""
        if self.members.pop(member.token, None) is None:
            return
        if member.expiry is not None:
            member.expiry.cancel()
        self._say("left", client=member.name)
        for table in (self._waiting, self._updating):
            future = table.pop(member.name, None)
            if future is not None:
                future.cancel()
        self.engine.leave_round(member.name)
        self._act(self.machine.leave(member.name, self.clock()))

    # -- requests ----------------------------------------------------------------------------------------------

    async def handle(self, member: Member, request: Request) -> Answer:
        """Answer one request; refusals become Failed and the session goes on."""
        try:
            return await self._dispatch(member, request)
        except MissedError:
            assert isinstance(request, Forward | Backward)
            return StepMissed(request.seq, request.round, request.step)
        except NumericalError as error:
            if isinstance(request, Forward | Backward):
                self.engine.sit_out(member.name, request.step)
            return failed(request.seq, "bad_tensor", error)
        except ProtocolError as error:
            return failed(request.seq, "bad_message", error, error.field)
        except RefusedError as error:
            return failed(request.seq, error.code, error)  # type: ignore[arg-type]
        except StorageError as error:
            log.error("%s", error)
            return Failed(request.seq, "storage", "the server cannot write its state", "Tell its operator.")
        except Exception:  # an answer must come, whatever happened; cancelled requests have no client any more
            log.exception("%s of %s failed", type(request).__name__, member.name)
            return Failed(request.seq, "internal", "the server failed inside", "Tell its operator to look at the log.")

    def _dispatch(self, member: Member, request: Request) -> Awaitable[Answer]:
        match request:
            case Forward():
                return self._forward(member, request)
            case Backward():
                return self._backward(member, request)
            case SitOut():
                return self._sit_out(member, request)
            case Fetch():
                return self._fetch(request)
            case NextRound():
                return self._next_round(member, request)
            case Upload():
                return self._upload(member, request)
            case Update():
                return self._update(member, request)
            case Bye():
                return self._bye(member, request)

    async def _fetch(self, request: Fetch) -> Answer:
        loop = asyncio.get_running_loop()
        data, total = await loop.run_in_executor(None, self.blobs.read, request.sha256, request.offset, request.limit)
        return Chunk(request.seq, request.sha256, request.offset, total, TensorBytes("u8", (len(data),), data))

    async def _forward(self, member: Member, request: Forward) -> Answer:
        hidden = await asyncio.to_thread(decode_tensor, request.hidden, self.device, what="hidden")
        batch, time_, _ = checked_shape(hidden, self.source.config.hidden_size)
        if request.lengths and (len(request.lengths) != batch or max(request.lengths) > time_):
            raise ProtocolError("lengths do not fit the batch", field="lengths")
        lengths = torch.tensor(request.lengths, device=self.device) if request.lengths else None
        key = StepKey(request.round, request.step, request.micro)
        output = await self.engine.forward(
            member.name,
            key,
            member.cut.trunk(self.layers),
            Rows(hidden, lengths),
            request.label_tokens,
            request.train,
        )
        return Hidden(request.seq, key.round, key.step, key.micro, await self._encode(output))

    async def _backward(self, member: Member, request: Backward) -> Answer:
        gradient = await asyncio.to_thread(decode_tensor, request.gradient, self.device, what="gradient")
        checked_shape(gradient, self.source.config.hidden_size)
        key = StepKey(request.round, request.step, request.micro)
        try:
            below = await self.engine.backward(member.name, key, gradient)
        except ValueError as error:
            raise ProtocolError(str(error), field="gradient") from error
        owed = bottom_trains(self.settings, member.cut)
        payload = await self._encode(below) if owed else None
        return Gradient(request.seq, key.round, key.step, key.micro, payload)

    async def _encode(self, output: Tensor) -> TensorBytes:
        return await asyncio.to_thread(encode_tensor, output, self.settings.wire.codec)

    async def _sit_out(self, member: Member, request: SitOut) -> Answer:
        self._say("sat_out", client=member.name, round=request.round, step=request.step)
        self.engine.sit_out(member.name, request.step)
        return StepMissed(request.seq, request.round, request.step)

    async def _next_round(self, member: Member, request: NextRound) -> Answer:
        if self.machine.phase is Phase.FINISHED:
            return Finished(request.seq, self.durable, self.weights)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[member.name] = future
        self.engine.leave_round(member.name)
        self._act(self.machine.wait(member.name, self.clock()))
        answer = await future
        return with_seq(answer, request.seq)

    async def _upload(self, member: Member, request: Upload) -> Answer:
        limit = 4 * sum(numel(shape) for shape in member.shared.values()) + HEADER_ALLOWANCE
        received = await asyncio.to_thread(self.inbox.receive, member.name, request, limit)
        return Uploaded(request.seq, request.sha256, received)

    async def _update(self, member: Member, request: Update) -> Answer:
        loop = asyncio.get_running_loop()
        update = await loop.run_in_executor(None, self.inbox.check, member.name, request, member.shared)
        future: asyncio.Future[Answer] = loop.create_future()
        self._updates[member.name] = update
        self._updating[member.name] = future
        self.engine.leave_round(member.name)
        try:
            self._act(self.machine.update(member.name, request.round, request.tokens, self.clock()))
        except RefusedError:
            self._updates.pop(member.name, None)
            self._updating.pop(member.name, None)
            return RoundDurable(request.seq, self.durable, self.weights, merged=False)
        return with_seq(await future, request.seq)

    async def _bye(self, member: Member, request: Bye) -> Answer:
        asyncio.get_running_loop().call_soon(self._forget, member)
        return Farewell(request.seq)

    # -- rounds ------------------------------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case OpenRound():
                    self._open(action)
                case MergeRound():
                    spawn(self._merge(action))
                case Finish():
                    self._finish(action.round)

    def _open(self, action: OpenRound) -> None:
        self._say("round_open", round=action.round, cohort=list(action.cohort))
        by_name = {member.name: member for member in self.members.values()}
        self.engine.open_round(action.round, [n for n in action.cohort if by_name[n].cut.trunk(self.layers)])
        for name in action.cohort:
            resolve(self._waiting.pop(name, None), RoundOpen(0, action.round, self.weights))
        deadline = self.machine.deadline()
        if deadline is not None:
            delay = max(0.0, deadline - self.clock())
            asyncio.get_running_loop().call_later(delay, lambda: self._act(self.machine.tick(self.clock())))

    async def _merge(self, action: MergeRound) -> None:
        """Merge, make it durable, tell everybody. A full disk keeps the round open until there is room."""
        updates = [self._updates[name] for name in action.contributors]
        while True:
            try:
                await self.engine.call(self._merge_now, action.round, updates)
                break
            except StorageError as error:
                log.error("round %d: %s; trying again in 10 s", action.round, error)
                self._say("storage_error", round=action.round, error=str(error))
                await asyncio.sleep(10)
        await asyncio.to_thread(self._offer_weights, action.round)
        self.durable = action.round
        for folder in self.store.prune():
            self.blobs.forget_folder(folder)
        self.inbox.clear()
        self._say("round_durable", round=action.round, clients=list(action.contributors))
        done, self._updating, self._updates = self._updating, {}, {}
        for name, future in done.items():
            resolve(future, RoundDurable(0, action.round, self.weights, merged=name in action.contributors))
        self._act(self.machine.merged(self.clock()))

    def _merge_now(self, round_: int, updates: list[ClientUpdate]) -> None:
        """On the compute thread: merge tensor by tensor, hand merged blocks to the trunk, write the round."""
        strategy = STRATEGIES[self.settings.merge.strategy]()
        trunk = self.trunk.weights()
        own = {
            name: Contribution(tensor, self.trunk.tokens_through(name))
            for name, tensor in trunk.items()
            if self.trunk.tokens_through(name)
        }
        merged = self.merged | {name: tensor for name, tensor in trunk.items() if name in own and self._held(name)}
        merged |= merge_updates(updates, strategy, partial(self._previous, trunk), own)
        self.trunk.load_weights(merged)
        self.merged = merged
        facts = {"updates": {update.client: update.tokens for update in updates}, "seed": self.settings.seed}
        weights, moments = self.trunk.weights(), self.trunk.optimizer.state_tensors()
        self.store.save(RoundState(round_, weights, moments, merged, facts))

    def _previous(self, trunk: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        """A shared tensor's value before the round; LoRA's B starts at zero."""
        for tensors in (self.merged, trunk):
            if name in tensors:
                return tensors[name]
        stored = name.replace(".base_layer.", ".")
        return self.source.read(stored).float() if self.source.has(stored) else torch.zeros(shape)

    def _held(self, name: str) -> bool:
        """Whether some allowed cut puts the block of this trunk weight on a client."""
        block = self.trunk.segment.block_of(name)
        assert block is not None
        top = self.layers - self.settings.tops[-1]
        return self.settings.merge.share != "none" and (block >= top or block < self.settings.bottoms[-1])

    def _finish(self, round_: int) -> None:
        self._say("finished", round=round_)
        for future in self._waiting.values():
            resolve(future, Finished(0, round_, self.weights))
        self._waiting.clear()
        self.finished.set()

    def close(self) -> None:
        """Stop computing; what is durable stays."""
        for member in list(self.members.values()):
            if member.expiry is not None:
                member.expiry.cancel()
        self.engine.close()

    def _say(self, event: str, **facts: object) -> None:
        self.report(Progress(event, facts))


def checked_shape(hidden: Tensor, width: int) -> tuple[int, int, int]:
    """(B, T, D) of hidden states. Raises ProtocolError when they are something else."""
    if hidden.dim() != 3 or hidden.shape[2] != width or 0 in hidden.shape:
        raise ProtocolError(f"shape {list(hidden.shape)} is not (batch, time, {width})", field="hidden")
    batch, time_, _ = hidden.shape
    return batch, time_, width


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def with_seq(answer: Answer, seq: int) -> Answer:
    """The same answer under the number of the request that it belongs to."""
    return replace(answer, seq=seq)


def failed(seq: int, code: ErrorCode, error: SplitFLError, field_: str = "") -> Failed:
    return Failed(seq, code, error.message[:2000], error.remedy[:2000], field_[:64])


def resolve(future: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if future is not None and not future.done():
        future.set_result(answer)
