"""The trunk service without its sockets: what becomes of each request.

The websocket shell and the in-process lab both feed it; everything runs on one event loop, and torch runs on the
engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from server_model.blobs import Blobs
from server_model.calibration import settled
from server_model.engine import Engine
from server_model.members import Member, Members
from server_model.preparing import check_settings, offer_assets
from server_model.releases import Releases
from server_model.rounds import Rounds
from server_model.steps import MissedError, StepKey
from server_model.store import Store
from server_model.threads import computing_thread
from server_model.trunk import Rows, Trunk
from server_model.updates import HEADER_ALLOWANCE
from server_model.witness import Witness
from splitfl.codec.tensors import BY_WIRE, by_record, decode_tensor, encode_tensor
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import NumericalError, ProtocolError, RefusedError, SplitFLError, StorageError
from splitfl.federation.agreement import Terms
from splitfl.files import keep_file
from splitfl.privacy.witness import Mark
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.flow import bottom_trains
from splitfl.split.narrow import load_release
from splitfl.split.shares import Shapes, shared_shapes
from splitfl.wire.messages import (
    Answer,
    AskHeld,
    Backward,
    Bye,
    Chunk,
    Countersign,
    Countersigned,
    Echo,
    Echoed,
    ErrorCode,
    Failed,
    Farewell,
    Fetch,
    Forward,
    Gradient,
    Held,
    Hello,
    Hidden,
    Missing,
    NextRound,
    Release,
    Request,
    SitOut,
    StepMissed,
    TensorBytes,
    Update,
    Upload,
    Uploaded,
    Welcome,
)
from splitfl.wire.session import choose_version

log = logging.getLogger("splitfl.server")
PASSING_STEPS = 4  # steps' worth of released activations that are held in memory for one client
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Something an operator wants to see; the shell prints it. ``time`` is UTC, in ISO 8601."""

    event: str
    facts: dict[str, object]
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


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
        threads: int = 0,
    ) -> None:
        self.source = CheckpointFolder(model)
        self.layers: int = self.source.config.num_hidden_layers
        self.device = device
        self.report = report
        check_settings(settings, self.source.config, device)
        self.settings = settings = settled(settings, self.source)
        rank = settings.release.rank
        self.decoder = None if rank is None else load_release(model).decoder.to(device)
        self.width: int = self.source.config.hidden_size if rank is None else rank  # of what is released
        self.blobs = Blobs()
        self.manifest = offer_assets(self.blobs, self.source, settings)
        self.terms = Terms(settings, self.manifest)
        store = Store(state)
        store.begin(model, settings, self.manifest, resume=resume)
        keep_file(state / "agreement.txt", "".join(f"{line}\n" for line in self.terms.lines()).encode())
        known = bool(store.durable_rounds())
        self.witness = Witness(state / "ledgers", strict=settings.privacy.on, known=known)
        trunk = Trunk(settings, self.source, range(settings.bottoms[0], self.layers - settings.tops[0]), device)
        budget, clients = int(settings.trunk.cache_gib * 2**30), settings.rounds.min_clients
        reserve = self._round_bytes(trunk)
        self.releases = Releases(state / "releases", budget, clients, terms=self.terms.sha256, reserve=reserve)
        threads = threads or torch.get_num_threads()
        self._codec = computing_thread("codec", 1)
        self.engine = Engine(trunk, settings, threads)  # after the codec: the last number holds for threads to come
        self._notary = asyncio.Lock()  # a ledger's states are written down in the order in which they came
        self.incarnation = secrets.token_hex(8)
        self.rounds = Rounds(
            *(settings, self.source, store, self.engine, self.blobs),
            clock=clock,
            say=self._say,
            make_room=self._make_room,
        )
        if resume:
            self.rounds.restore()
            self._clear_releases()  # which a server that was killed at the end has left
        self.members = Members(settings, self.layers, cache(self._shapes_of), self._left)

    def _shapes_of(self, cut: Cut) -> Shapes:
        return shared_shapes(self.source.config, self.settings, cut)

    def _round_bytes(self, trunk: Trunk) -> int:
        """About what a round takes on disk: the trunk with its moments, what is merged, and the clients' updates."""
        ends = sum(numel(shape) for shape in self._shapes_of(self.settings.cut).values())
        weights = sum(weight.numel() for weight in trunk.trainable().values())
        return 4 * (3 * weights + (2 + self.settings.rounds.min_clients) * ends)

    # -- sessions ----------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, certificate: str = "", *, loopback: bool = False) -> tuple[Member, Welcome]:
        """Open or resume a session for the holder of ``certificate`` (its serial number; "" on a plain socket).

        Raises ProtocolError, RefusedError or StorageError; the shell turns them into Refused.
        """
        version = choose_version(hello)
        mark = self.witness.last(hello.name, proven=bool(certificate))
        member, resumed = self.members.welcome(hello)
        member.certificate, member.loopback = certificate, loopback
        about = {"cut": str(member.cut), "holds_round": hello.round, "software": hello.software}
        self._say("connected", client=member.name, resumed=resumed, **about)
        return member, Welcome(
            version=version,
            session=member.token,
            resumed=resumed,
            incarnation=self.incarnation,
            round=self.rounds.durable,
            n_bottom=member.cut.n_bottom,
            n_top=member.cut.n_top,
            settings=self.settings.model_dump_json(),
            manifest=self.manifest,
            signer=self.witness.signer,
            ledger_rows=mark.count,
            ledger_head=mark.head,
        )

    def disconnected(self, member: Member) -> None:
        """The connection is gone; the session stays for the grace period."""
        if self.members.disconnected(member):
            self._say("disconnected", client=member.name, grace_s=self.settings.trunk.grace_s)

    def _left(self, member: Member, why: str) -> None:
        traffic = {"bytes_in": member.bytes_in, "bytes_out": member.bytes_out}
        self._say("left", client=member.name, reason=why, **traffic)
        self.rounds.leave(self.members, member)

    # -- requests ----------------------------------------------------------------------------------------------

    async def handle(self, member: Member, request: Request) -> Answer:
        """Answer one request; refusals become Failed and the session goes on."""
        try:
            return await self._dispatch(member, request)
        except MissedError:
            assert isinstance(request, Forward | Backward)
            return StepMissed(request.seq, request.round, request.step)
        except NumericalError as error:
            if isinstance(request, Backward) or (isinstance(request, Forward) and request.train):
                self._leave_out(member, request.round, request.step, error.message)
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
        """The work on a request. Raises RefusedError when the session ended after the request had come."""
        if member not in self.members:
            raise RefusedError("this session has ended", "Join again.", code="wrong_round")
        match request:
            case Forward():
                return self._forward(member, request)
            case Release():
                return self._release(member, request)
            case Echo():
                return self._echo(request)
            case AskHeld():
                return self._held(member, request)
            case Countersign():
                return self._countersign(member, request)
            case Backward():
                return self._backward(member, request)
            case SitOut():
                return self._sit_out(member, request)
            case Fetch():
                return self._fetch(request)
            case NextRound():
                return self.rounds.next_round(self.members, member, request)
            case Upload():
                return self._upload(member, request)
            case Update():
                return self.rounds.update(self.members, member, request)
            case Bye():
                return self._bye(member, request)

    async def _fetch(self, request: Fetch) -> Answer:
        loop = asyncio.get_running_loop()
        data, total = await loop.run_in_executor(None, self.blobs.read, request.sha256, request.offset, request.limit)
        return Chunk(request.seq, request.sha256, request.offset, total, TensorBytes("u8", (len(data),), data))

    async def _echo(self, request: Echo) -> Answer:
        return Echoed(request.seq, TensorBytes("u8", (request.want,), bytes(request.want)))

    async def _held(self, member: Member, request: AskHeld) -> Answer:
        held = await self._in_order(lambda: [self.releases.holds(member.name, name) for name in request.records])
        return Held(request.seq, tuple(held))

    async def _release(self, member: Member, request: Release) -> Answer:
        return Held(request.seq, await self._in_order(self._keep, member, request))

    def _keep(self, member: Member, request: Release) -> tuple[bool, ...]:
        """Keep released activations on disk, or until the Forward that names them. Raises what the shape deserves."""
        limits, payload = self.settings.batch, request.hidden
        if len(payload.shape) != 3 or payload.shape[0] != len(request.records) or 0 in payload.shape:
            raise ProtocolError(f"{len(request.records)} records in shape {list(payload.shape)}", field="hidden")
        if payload.shape[2] != self.width or payload.dtype not in BY_WIRE:
            raise ProtocolError(f"{payload.dtype} {list(payload.shape)} is no activation here", field="hidden")
        if payload.shape[0] > limits.records or payload.shape[1] > limits.max_length:
            raise RefusedError("more records, or longer ones, than a step has", "Send fewer.", code="over_limit")
        held = []
        for name, piece in zip(request.records, by_record(payload), strict=True):
            held.append(self.releases.put(member.name, name, piece))
            if not held[-1]:
                member.passing[name] = piece
        while len(member.passing) > PASSING_STEPS * limits.records:
            del member.passing[next(iter(member.passing))]
        return tuple(held)

    async def _countersign(self, member: Member, request: Countersign) -> Answer:
        mark, proven = Mark(request.rows, request.head), bool(member.certificate)
        async with self._notary:
            signature = await self.rounds.written(self.witness.countersign, member.name, mark, proven=proven)
        return Countersigned(request.seq, mark.count, mark.head, signature)

    async def _forward(self, member: Member, request: Forward) -> Answer:
        key = StepKey(request.round, request.step, request.micro)
        came = await self._in_order(self._rows_of, member, request, key)
        if isinstance(came, Missing):
            return came
        output = await self.engine.forward(
            member.name, key, member.cut.trunk(self.layers), came, request.label_tokens, request.train
        )
        payload = await self._encode(member, output, "the trunk's output for these activations")
        return Hidden(request.seq, key.round, key.step, key.micro, payload)

    def _rows_of(self, member: Member, request: Forward, key: StepKey) -> Rows | Missing:
        """A micro-batch's hidden states: those that came with it, or those of the records that it names."""
        if request.hidden is not None:
            hidden = decode_tensor(request.hidden, self.device, what="hidden")
            lengths = request.lengths
        else:
            found = self._named(member, request, key)
            if isinstance(found, Missing):
                return found
            hidden, lengths = found
        batch, time_, _ = checked_shape(hidden, self.width)
        self._check_size(member, request, batch, time_, lengths)
        if self.decoder is not None:
            with torch.no_grad():
                hidden = self.decoder(hidden)
        return Rows(hidden, torch.tensor(lengths, device=self.device) if lengths else None)

    def _named(self, member: Member, request: Forward, key: StepKey) -> tuple[Tensor, tuple[int, ...]] | Missing:
        """Released records as one batch (B, T, D), with their lengths where these differ."""
        if not request.records:
            raise ProtocolError("neither hidden states nor records", field="hidden")
        most = self.settings.batch.records // member.micro_batches
        if len(request.records) > most:
            raise RefusedError(f"{len(request.records)} records in a micro-batch of {most}", code="over_limit")
        if member.stalled is not None and (member.stalled.round, member.stalled.step) != (key.round, key.step):
            member.stalled = None  # that step is over
        found = [self.releases.get(member.name, name) or member.passing.get(name) for name in request.records]
        missing = tuple(name for name, payload in zip(request.records, found, strict=True) if payload is None)
        behind = member.stalled is not None and key.micro > member.stalled.micro
        if missing or behind:
            member.stalled = member.stalled if behind else key
            return Missing(request.seq, key.round, key.step, key.micro, missing)
        member.stalled = None
        for name in request.records:
            member.passing.pop(name, None)
        payloads = [payload for payload in found if payload is not None]
        rows = [decode_tensor(payload, self.device, what="a released activation") for payload in payloads]
        lengths = tuple(row.shape[0] for row in rows)
        hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T, D)
        return hidden, lengths if min(lengths) != max(lengths) else ()

    def _check_size(self, member: Member, request: Forward, batch: int, time_: int, lengths: tuple[int, ...]) -> None:
        """Raise RefusedError or ProtocolError for a micro-batch that this client does not have."""
        limits = self.settings.batch
        most = limits.records // member.micro_batches
        if batch > most or time_ > limits.max_length:
            raise RefusedError(
                f"a micro-batch of {batch} x {time_} tokens, where {most} x {limits.max_length} is the most",
                "Train with the settings that the server sent.",
                code="over_limit",
            )
        if lengths and (len(lengths) != batch or not 1 <= min(lengths) <= max(lengths) <= time_):
            raise ProtocolError("lengths do not fit the batch", field="lengths")
        if request.label_tokens > batch * time_:
            raise ProtocolError(f"{request.label_tokens} label tokens in {batch * time_}", field="label_tokens")
        if request.train and request.step >= self.settings.rounds.local_steps:
            raise ProtocolError(f"step {request.step} of {self.settings.rounds.local_steps}", field="step")
        if request.train and request.micro >= member.micro_batches:
            raise ProtocolError(f"micro-batch {request.micro} of {member.micro_batches}", field="micro")

    async def _backward(self, member: Member, request: Backward) -> Answer:
        gradient = await self._in_order(decode_tensor, request.gradient, self.device, what="gradient")
        checked_shape(gradient, self.source.config.hidden_size)
        key = StepKey(request.round, request.step, request.micro)
        below = await self.engine.backward(member.name, key, gradient)
        owed = bottom_trains(self.settings, member.cut)
        payload = await self._encode(member, below, "the gradient at the trunk's input") if owed else None
        return Gradient(request.seq, key.round, key.step, key.micro, payload)

    async def _in_order(self, convert: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a codec on its one thread, so that no micro-batch overtakes the one that its client sent before."""
        return await asyncio.get_running_loop().run_in_executor(self._codec, partial(convert, *args, **kwargs))

    async def _encode(self, member: Member, output: Tensor, what: str) -> TensorBytes:
        try:
            return await self._in_order(encode_tensor, output, member.codec)
        except NumericalError as error:
            raise NumericalError(f"{what} holds NaN or infinity", error.remedy) from error

    async def _sit_out(self, member: Member, request: SitOut) -> Answer:
        self._leave_out(member, request.round, request.step, "its own numbers were not finite")
        return StepMissed(request.seq, request.round, request.step)

    def _leave_out(self, member: Member, round_: int, step: int, reason: str) -> None:
        """A step goes on without this client; the others' numbers are sound."""
        self._say("sat_out", client=member.name, round=round_, step=step, reason=reason)
        if round_ == self.engine.round:
            self.engine.sit_out(member.name, step)

    async def _upload(self, member: Member, request: Upload) -> Answer:
        limit = 4 * sum(numel(shape) for shape in member.shared.values()) + HEADER_ALLOWANCE
        received = await self.rounds.written(self.rounds.inbox.receive, member.name, request, limit)
        return Uploaded(request.seq, request.sha256, received)

    async def _bye(self, member: Member, request: Bye) -> Answer:
        asyncio.get_running_loop().call_soon(self.members.forget, member, f"it said goodbye ({request.reason})")
        return Farewell(request.seq)

    async def shut_out(self, member: Member) -> None:
        """End a session whose certificate is no longer good; what its client released is of no more use."""
        self.members.forget(member, "its certificate is no longer good")
        await self._in_order(self.releases.forget, member.name)

    def close(self) -> None:
        """Stop computing; what is durable stays."""
        self.members.close()
        self.engine.close()
        self._codec.shutdown(wait=True, cancel_futures=True)
        self._clear_releases()

    def _make_room(self) -> None:
        """The disk is full: kept releases give way to a round, for losing them costs bandwidth alone."""
        if self.releases.size:
            self._say("releases_dropped", bytes=self.releases.size)
            self._codec.submit(self.releases.give_way)

    def _clear_releases(self) -> None:
        """After the end nobody needs them: whoever still measures with one sends it again."""
        if self.rounds.finished.is_set():
            self.releases.clear()

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


def failed(seq: int, code: ErrorCode, error: SplitFLError, field_: str = "") -> Failed:
    return Failed(seq, code, error.message[:2000], error.remedy[:2000], field_[:64])
