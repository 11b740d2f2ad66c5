"""A whole federation in one process: the trunk service, its clients and every frame between them, without sockets.

It is the same code as ``splitfl serve`` and ``splitfl join`` but for the two websocket shells: each client is a
``Participant`` in a thread of its own, the ``Coordinator`` runs on an event loop in another, and what passes between
them is encoded, numbered, decoded and checked as on the wire. So byte counts are real ones, and a bug found here is
a bug there. What a network adds (delay, loss, reconnection) is not here.

``run_federation`` is for experiments. ``MemoryService`` and ``MemoryLink`` are its parts, for a simulator that
decides by itself who is there and when.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import Tensor

from client_model.choices import Choices
from client_model.events import Event
from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator, Progress
from server_model.exporting import export_state
from server_model.store import Store
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError, LinkError
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.split.checkpoint import read_config
from splitfl.split.modes import choose_device
from splitfl.split.selfcheck import check_family_splits
from splitfl.wire.messages import CLIENT_NAME, PROTOCOL_VERSIONS, Hello

T = TypeVar("T")


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
    noise_seed: int | None = None,
    report: Callable[[FederationEvent], None] = lambda _: None,
) -> FederationResult:
    """Train the checkpoint ``model`` with one client for each entry of ``data`` (name -> file or folder of text).

    ``folder`` is new or empty and keeps the state. ``cuts`` are for clients that keep other blocks than the
    federation's own cut; ``settings`` must allow them. ``noise_seed`` makes noise that comes again, and protects
    nothing: the report says so. ``report`` hears every event as it happens, one at a time.

    The same arguments give the same weights, to the bit, on the same machine: the first round waits for everybody, and
    the trunk orders its batches by name. With ``trunk.mode = "sequential"``, with deadlines, or where a step's tokens
    are more than ``trunk.max_tokens_in_flight``, it counts who comes first.

    All clients and the trunk share the cores. With many clients ``torch.set_num_threads(1)`` is fastest.

    Raises whatever the first failing client or the service raised; the others are stopped, and no thread stays behind.
    """
    model, folder = Path(model), Path(folder)
    texts = {name: Path(path) for name, path in data.items()}
    check_arguments(texts, settings, folder, cuts or {})
    check_family_splits(read_config(model))
    place = choose_device(device)
    events: list[FederationEvent] = []

    def hear(event: FederationEvent) -> None:
        events.append(event)
        report(event)

    reporter = Reporter(hear)
    coordinator = Coordinator(model, settings, server_folder(folder), device=place, report=reporter.of_service)
    coordinator.rounds.machine.present.update(data)  # no round opens before all of them ask for one
    with TemporaryDirectory(dir=folder, prefix=".cache-") as cache, MemoryService(coordinator) as service:
        jobs: dict[str, Callable[[], dict[str, Any]]] = {}
        for name, path in texts.items():
            store = ClientStore(client_folder(folder, name))
            participant = Participant(name, path, store, Path(cache) / name, place, reporter.of_client(name))
            participant.plan = Choices((cuts or {}).get(name))
            participant.accept = lambda _: True  # whoever runs this has written the terms
            participant.key_file = store.folder / "key"
            participant.simulated, participant.noise_seed = True, noise_seed
            jobs[name] = joined(service, participant, (cuts or {}).get(name))
        reporter.stop = service.fail
        reports = run_together(service, jobs)
    return FederationResult(folder, settings, reports, events)


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


class Reporter:
    """Passes all events on, one at a time whatever thread they come from.

    ``stop`` hears of a report that failed on an event of the service, where raising it would blame the service.
    """

    def __init__(self, report: Callable[[FederationEvent], None]) -> None:
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
            self._report(event)
