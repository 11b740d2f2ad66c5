"""A whole federation in one process: the trunk service, its clients and every frame between them, without sockets.

It is the same code as ``splitfl serve`` and ``splitfl join`` but for the two websocket shells: each client is a
``Participant`` in a thread of its own, the ``Coordinator`` runs on an event loop in another, and what passes between
them is encoded, numbered, decoded and checked as on the wire. So byte counts are real ones, and a bug found here is
a bug there. What a network adds (delay, loss, reconnection) is not here.

``run_federation`` is for experiments. ``MemoryService`` and ``MemoryLink`` are its parts, for a simulator that
decides by itself who is there and when.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from client_model.participant import Event, Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator, Progress
from server_model.exporting import export_state
from server_model.members import Member
from server_model.store import Store
from server_model.tasks import spawn
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError, LinkError, ProtocolError, RefusedError
from splitfl.split.checkpoint import read_config
from splitfl.split.modes import choose_device
from splitfl.split.selfcheck import check_family_splits
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import CLIENT_NAME, PROTOCOL_VERSIONS, Answer, Failed, Hello, Request, Welcome
from splitfl.wire.session import Answered, ClientSession, Connected

T = TypeVar("T")

URL = "memory:"  # what a client writes down as its server's address


@dataclass(frozen=True)
class FederationEvent:
    """Something that happened. ``client`` is whose event it is; "" is the trunk service."""

    client: str
    event: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class FederationResult:
    """What a federation left: each client's closing report, all events in order, and ``folder`` with the state."""

    folder: Path
    settings: Federation
    reports: Mapping[str, Mapping[str, Any]]
    events: Sequence[FederationEvent]

    @property
    def state(self) -> Path:
        """The trunk service's state folder, as ``splitfl export --state`` takes it."""
        return server_folder(self.folder)

    def client_state(self, client: str) -> Path:
        """A client's own state folder."""
        return client_folder(self.folder, client)

    def training_losses(self, client: str) -> list[tuple[int, float]]:
        """(optimizer steps done, mean loss of that step in nats per token)."""
        steps = [told.facts for told in self.events if told.client == client and told.event == "step"]
        per_round = self.settings.rounds.local_steps
        return [(facts["round"] * per_round + facts["step"] + 1, facts["loss"]) for facts in steps]

    def held_out_losses(self, client: str) -> list[tuple[int, float]]:
        """(optimizer steps behind the weights, mean held-out loss in nats per token), from before the first step on."""
        per_round = self.settings.rounds.local_steps
        return [(entry["round"] * per_round, entry["loss"]) for entry in self.reports[client]["held_out_losses"]]

    def weights(self) -> dict[str, Tensor]:
        """All weights that were trained and are not personal, by their names in the checkpoint."""
        store = Store(self.state)
        last = store.load(store.durable_rounds()[-1])
        return {**last.trunk, **last.merged}

    def export(self, out: Path, *, client: str | None = None, dtype: str = "float32") -> Path:
        """Write the federated model as a Hugging Face folder; ``client`` names whose head to take where heads are
        personal. Raises ConfigError, StorageError."""
        export_state(self.state, out, client=None if client is None else self.client_state(client), dtype=dtype)
        return out


def run_federation(
    model: Path | str,
    data: Mapping[str, Path | str],
    settings: Federation,
    folder: Path | str,
    *,
    cuts: Mapping[str, Cut] | None = None,
    device: str = "cpu",
    report: Callable[[FederationEvent], None] = lambda _: None,
) -> FederationResult:
    """Train the checkpoint ``model`` with one client for each entry of ``data`` (name -> file or folder of text).

    ``folder`` is new or empty and keeps the state. ``cuts`` are for clients that keep other blocks than the
    federation's own cut; ``settings`` must allow them. ``report`` hears every event as it happens, one at a time.

    The same arguments give the same weights, to the bit, on the same machine: the first round waits for everybody, and
    the trunk orders its batches by name. With ``cuts`` that differ they are equal but for rounding (gradients of
    different block ranges are summed as they come); with ``trunk.mode = "sequential"`` or with deadlines it counts
    who comes first.

    All clients and the trunk share the cores. With many clients ``torch.set_num_threads(1)`` is fastest.

    Raises whatever the first failing client or the service raised; the others are stopped, and no thread stays behind.
    """
    model, folder = Path(model), Path(folder)
    texts = {name: Path(path) for name, path in data.items()}
    check_arguments(texts, settings, folder, cuts or {})
    check_family_splits(read_config(model))
    place, log = choose_device(device), EventLog(report)
    coordinator = Coordinator(model, settings, server_folder(folder), device=place, report=log.of_service)
    coordinator.rounds.machine.present.update(data)  # no round opens before all of them ask for one
    with TemporaryDirectory(dir=folder, prefix=".cache-") as cache, MemoryService(coordinator) as service:
        jobs: dict[str, Callable[[], dict[str, Any]]] = {}
        for name, path in texts.items():
            store = ClientStore(client_folder(folder, name))
            participant = Participant(name, path, store, Path(cache) / name, place, log.of_client(name))
            jobs[name] = joined(service, participant, (cuts or {}).get(name))
        log.stop = service.fail
        reports = run_together(service, jobs)
    return FederationResult(folder, settings, reports, log.events)


def check_arguments(data: Mapping[str, Path], settings: Federation, folder: Path, cuts: Mapping[str, Cut]) -> None:
    """Raise ConfigError for a federation that could not run, or would wait for ever."""
    if not data:
        raise ConfigError("a federation without clients", "Name at least one client and its data.")
    if settings.rounds.min_clients > len(data):
        raise ConfigError(
            f"rounds.min_clients = {settings.rounds.min_clients}, but there are {len(data)} clients",
            "Lower it, or add clients: the first round would never open.",
        )
    for name in data:
        if re.fullmatch(CLIENT_NAME, name) is None:
            raise ConfigError(f"{name!r} is no client's name", "Use letters, digits, '.', '_' and '-', at most 64.")
    for path in data.values():
        if not path.exists():
            raise ConfigError(f"{path} does not exist", "Give each client a file or a folder of text.")
    unknown = sorted(cuts.keys() - data.keys())
    if unknown:
        raise ConfigError(f"a cut for {unknown[0]!r}, which has no data", f"Clients are {', '.join(data)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is in use", "Name a new or empty folder for the federation's state.")


def server_folder(folder: Path) -> Path:
    return folder / "server"


def client_folder(folder: Path, client: str) -> Path:
    return folder / "clients" / client


def joined(service: MemoryService, participant: Participant, cut: Cut | None) -> Callable[[], dict[str, Any]]:
    """Connect a participant now; the returned function takes part and gives the closing report."""
    link = MemoryLink(service, hello_of(participant.name, cut))
    welcome = link.open()
    return lambda: participant.run(link, welcome, URL)


def hello_of(name: str, cut: Cut | None) -> Hello:
    """The first words of a new client."""
    bottom, top = (-1, -1) if cut is None else (cut.n_bottom, cut.n_top)
    return Hello(PROTOCOL_VERSIONS, name, n_bottom=bottom, n_top=top)


def run_together(service: MemoryService, jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run every client's job in a thread of its own. The first failure stops the others and is raised."""
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="client") as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C, or the notebook's stop button
            service.fail(LinkError("the federation was interrupted", "Run it again in a new folder."))
            raise
        for name, future in futures.items():
            if future.done() and (error := future.exception()) is not None:
                service.fail(LinkError(f"the federation was stopped: {name} failed", "See that client's error."))
                raise error
    return {name: future.result() for name, future in futures.items()}


class EventLog:
    """Keeps all events, and passes them on one at a time whatever thread they come from.

    ``stop`` hears of a report that failed on an event of the service, where raising it would blame the service.
    """

    def __init__(self, report: Callable[[FederationEvent], None]) -> None:
        self.events: list[FederationEvent] = []
        self.stop: Callable[[BaseException], None] = lambda _: None
        self._report = report
        self._lock = threading.Lock()

    def of_client(self, name: str) -> Callable[[Event], None]:
        """What ``Participant`` reports to."""
        return lambda event: self._tell(FederationEvent(name, event.event, event.facts))

    def of_service(self, progress: Progress) -> None:
        """What ``Coordinator`` reports to."""
        try:
            self._tell(FederationEvent("", progress.event, progress.facts))
        except Exception as error:  # noqa: BLE001 - it is raised again by whoever runs the federation
            self.stop(error)

    def _tell(self, event: FederationEvent) -> None:
        with self._lock:
            self.events.append(event)
            self._report(event)


class MemoryService:
    """Serves a coordinator to links in this process, on an event loop in a thread, for the length of a ``with``.

    At its end the coordinator is closed, every open link raises LinkError, and the thread is gone.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._failure: BaseException | None = None
        self._links: set[MemoryLink] = set()
        self._ended = asyncio.Event()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="service", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.fail(LinkError("the service in this process has ended", "Do all requests inside its with block."))
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._background_failure)
        self._started.set_result(loop)
        await self._ended.wait()
        self.coordinator.close()

    def fail(self, error: BaseException) -> None:
        """From now on every request of every link raises ``error``, the unanswered ones included; the first one counts.

        May be called from any thread.
        """
        self._failure = self._failure or error
        for link in list(self._links):
            link.fail(self._failure)

    def connect(self, link: MemoryLink, frame: bytes) -> tuple[Member, bytes]:
        """Answer Hello: the session, and the frame of Welcome. Raises ProtocolError, RefusedError."""

        async def connect() -> tuple[Member, bytes]:
            hello = decode(frame)
            if not isinstance(hello, Hello):
                raise ProtocolError("the first message must be hello", field="t")
            member, welcome = self.coordinator.hello(hello)
            return member, b"".join(encode(welcome))

        if self._failure is not None:
            raise self._failure
        opened = asyncio.run_coroutine_threadsafe(connect(), self._loop).result()
        self._links.add(link)
        return opened

    def disconnect(self, link: MemoryLink, member: Member) -> None:
        """The link is gone without a goodbye; its session lives on for the grace period."""
        self._links.discard(link)
        if self._failure is None:
            self._loop.call_soon_threadsafe(self.coordinator.disconnected, member)

    def send(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        """Take a client's frame; what there is to answer comes back through ``link.deliver``."""
        self._loop.call_soon_threadsafe(self._receive, link, member, frame)

    def _receive(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        member.bytes_in += len(frame)
        try:
            request, _ = member.wire.receive(frame)  # nothing is ever lost here, so nothing is repeated
        except ProtocolError as error:
            link.fail(error)
            return
        if request is not None:
            spawn(self._answer(link, member, request))

    async def _answer(self, link: MemoryLink, member: Member, request: Request) -> None:
        answer = await self.coordinator.handle(member, request)
        frame = b"".join(member.wire.answer(answer))
        member.bytes_out += len(frame)
        link.deliver(frame)

    def _background_failure(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A task that nobody waits for has failed: a merge, a step of the trunk."""
        self.fail(context.get("exception") or RuntimeError(context["message"]))


class MemoryLink:
    """A client's link to a ``MemoryService``: what ``client_model.link.Link`` is to a websocket.

    ``bytes_sent`` and ``bytes_received`` count whole frames, as they would travel.
    """

    def __init__(self, service: MemoryService, hello: Hello) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._service = service
        self._session = ClientSession(hello)
        self._member: Member | None = None
        self._futures: dict[int, Future[Answer]] = {}
        self._failure: BaseException | None = None
        self._lock = threading.Lock()  # requests come from the client's thread, answers from the service's

    def open(self) -> Welcome:
        """Say Hello; returns the service's Welcome. Raises RefusedError, ProtocolError."""
        self._member, frame = self._service.connect(self, self._counted(self._session.hello()))
        self.bytes_received += len(frame)
        (event,) = self._session.receive(frame)
        assert isinstance(event, Connected)
        return event.welcome

    def request(self, message: Request) -> Future[Answer]:
        """Send a request; its future gives the answer, or raises RefusedError, or why the federation was stopped."""
        future: Future[Answer] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            if self._member is None:
                raise LinkError("this link is not open", "Call open() first.")
            seq, parts = self._session.request(message)
            self._futures[seq] = future
            self._service.send(self, self._member, self._counted(parts))
        return future

    def ask(self, message: Request) -> Answer:
        """Send a request and wait for its answer."""
        return self.request(message).result()

    @property
    def next_seq(self) -> int:
        """The number of the next request."""
        return self._session.next_seq

    def close(self) -> None:
        """Hang up without a goodbye, as a connection that breaks."""
        self.fail(LinkError("this link is closed", "Open another one."))
        if self._member is not None:
            self._service.disconnect(self, self._member)

    def deliver(self, frame: bytes) -> None:
        """A frame from the service has arrived."""
        with self._lock:
            self.bytes_received += len(frame)
            answers = [event.answer for event in self._session.receive(frame) if isinstance(event, Answered)]
            waiting = [(self._futures.pop(answer.seq, None), answer) for answer in answers]
        for future, answer in waiting:
            if future is not None:
                settle(future, answer)

    def fail(self, error: BaseException) -> None:
        """Every request raises ``error`` from now on, the unanswered ones included; the first one counts."""
        with self._lock:
            self._failure = self._failure or error
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(error)

    def _counted(self, parts: Sequence[bytes | memoryview]) -> bytes:
        """The frame as one piece: a copy, as a socket would make, so that no two sides share memory."""
        frame = b"".join(parts)
        self.bytes_sent += len(frame)
        return frame


def settle(future: Future[Answer], answer: Answer) -> None:
    """Give a request its answer; a refusal is raised where it is awaited."""
    if isinstance(answer, Failed):
        future.set_exception(RefusedError(answer.reason, answer.remedy, code=answer.code))
    else:
        future.set_result(answer)
