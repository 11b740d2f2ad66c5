"""``splitfl join``: the thin client. Torch is imported inside, so that --help stays quick."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import typer
from pydantic import TypeAdapter, ValidationError

from client_model.choices import Choices
from client_model.consent import Consent
from client_model.floor import Floor
from client_model.places import default_cache, default_state
from client_model.resuming import check_same_client, first_words, open_journal, paused_choices
from client_model.telling import EventPrinter, print_report
from splitfl.allocator import share_one_heap
from splitfl.channel.joining import JoinString
from splitfl.console import command, is_loopback, note, print_json, require_loopback
from splitfl.cut import Cut
from splitfl.errors import ConfigError, LinkError, SplitFLError, StorageError
from splitfl.files import claimed
from splitfl.wire.messages import Bye, Name

if TYPE_CHECKING:
    from ssl import SSLContext

    from client_model.link import Link
    from client_model.participant import Participant
    from client_model.scouting import Scouted


def join(
    address: Annotated[
        str,
        typer.Argument(
            metavar="JOIN",
            help="The line that `splitfl invite` printed, - to read it from stdin; on loopback also ws://HOST:PORT.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Your text: .jsonl, .csv, .txt, .parquet, or a folder of them.")],
    name: Annotated[str, typer.Option(help="This client's name; a join string holds it already.")] = "",
    state: Annotated[
        Path | None, typer.Option(help="Folder for this client's state; the default is under ~/.local/state.")
    ] = None,
    accept: Annotated[
        str, typer.Option(metavar="HASH", help="Accept the federation's terms by their hash; without it you are asked.")
    ] = "",
    privacy: Annotated[
        str,
        typer.Option(
            metavar="FLOOR",
            help="The least privacy to take part with: off; measured:NOISE (of all that leaves, in clip norms) or "
            "measured:NOISE,KIND:NOISE (a kind's own: gradients, weights, losses); certified:EPSILON (at most).",
        ),
    ] = "off",
    key: Annotated[
        Path | None, typer.Option(help="File of this client's secret key; the default is under ~/.config/splitfl.")
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            help="Blocks to keep here, BOTTOM,TOP, from the next round on; federation takes its own cut; auto measures "
            "this machine and the link, and plans cut, micro-batches, arithmetic and codec (see `splitfl probe`)."
        ),
    ] = "auto",
    model: Annotated[
        Path | None, typer.Option(help="A local copy of the base model, instead of fetching the ends.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for fetched parts of base models; the default is under ~/.cache/splitfl."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads torch may use; 0 = all cores.")] = 0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that is away.")] = 600.0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count rows that cannot be read; go on.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an unencrypted link beyond this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line: events, then report.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Train with a federation until it ends: the file stays here, activations computed from it go to the trunk.

    What the server can make of them depends on the federation's privacy mode, which its terms state.
    """
    with command(verbose=verbose):
        from splitfl.pipe import tune_process

        tune_process(note)
        invited = read_join_string(address, name)
        url = invited.url if invited else check_address(address, insecure=insecure)
        name = invited.name if invited else name
        check_name(name)
        check_data(data, skip_bad=skip_bad)
        choices = parse_plan(plan)
        folder = state or default_state(url, name, invited.authority if invited else "")
        with claimed(folder):
            participant = prepare(name, data, folder, cache or default_cache(), device, threads)
            participant.skip_bad, participant.local_model = skip_bad, model
            participant.accept, participant.key_file = Consent(accept, as_json=as_json), key
            participant.floor = Floor.parse(privacy)
            participant.report = EventPrinter(as_json=as_json)
            plans = plans_of(participant, choices, url, patience, invited)
            run(participant, plans, url, patience, as_json=as_json, invited=invited)


def read_join_string(address: str, name: str) -> JoinString | None:
    """The join string, if it is one and no other address. Raises ConfigError."""
    if address != "-" and not address.startswith("splitfl:"):
        return None
    join = JoinString.parse(sys.stdin.readline() if address == "-" else address)
    if name and name != join.name:
        raise ConfigError(f"this join string is {join.name!r}'s, not {name!r}'s", "Leave --name out.")
    return join


def enrolled(join: JoinString, state: Path, patience: float) -> SSLContext:
    """The TLS settings to join with. Raises SplitFLError."""
    from functools import partial

    from client_model.identity import obtain
    from client_model.link import ask_once

    return obtain(join, state, partial(ask_once, patience_s=patience, say=note))


def check_address(address: str, *, insecure: bool) -> str:
    """The websocket address to join. Raises ConfigError."""
    parts = urlsplit(address)
    if parts.scheme != "ws" or not parts.hostname or not has_port(parts):
        shown = address.rpartition("@")[2]  # before it may stand a token
        raise ConfigError(f"{shown!r} is no address to join", "Write it as ws://HOST:PORT, as `splitfl serve` says.")
    require_loopback(parts.hostname, insecure=insecure)
    if is_loopback(parts.hostname):
        note("the link is NOT encrypted; it stays on this machine (a join string of `splitfl invite` encrypts)")
    return address


def has_port(parts: SplitResult) -> bool:
    """Whether the address names a port that can be one; a websocket's default, 80, is never meant."""
    try:
        return bool(parts.port)
    except ValueError:
        return False


def check_name(name: str) -> None:
    """Raise ConfigError for a name that the protocol does not carry; it is part of file names on both sides."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} is no client name",
            "Give --name NAME: letters, digits, dots, dashes and underscores, 64 at most.",
        ) from None


def check_data(path: Path, *, skip_bad: bool) -> None:
    """Raise DataError for a file that cannot be used, before anybody is asked anything and a token is spent."""
    from splitfl.data.readers import check_beginning  # imports NumPy

    check_beginning(path, skip_bad=skip_bad)


def parse_plan(plan: str) -> Choices | None:
    """None for one that is still to be made. Raises ConfigError."""
    if plan == "auto":
        return None
    return Choices() if plan == "federation" else Choices(Cut.parse(plan))


def prepare(name: str, data: Path, state: Path, cache: Path, device: str, threads: int) -> Participant:
    """A participant with its state folder; loads torch."""
    import torch

    from client_model.participant import Participant
    from client_model.store import ClientStore
    from splitfl.split.modes import choose_device

    share_one_heap()
    if threads:
        torch.set_num_threads(threads)
    return Participant(name, data, ClientStore(state), cache.expanduser(), choose_device(device))


def plans_of(
    participant: Participant, choices: Choices | None, url: str, patience: float, invited: JoinString | None
) -> Callable[[], Choices]:
    """What gives the plan to take part with, now and whenever the participant asks for another one."""
    if choices is not None:
        return lambda: choices
    from client_model.replanning import AutoPlan
    from client_model.scouting import Scout

    def visit() -> Scouted:
        check_same_client(participant.name, participant.store)
        tls = enrolled(invited, participant.store.folder, patience) if invited else None
        return Scout(participant.name, url, tls, participant.cache, participant.device, patience, note).look()

    auto = AutoPlan(participant.store, participant.device, visit, note)
    participant.wants_plan = auto.is_stale
    return auto.choose


def run(
    participant: Participant,
    plans: Callable[[], Choices],
    url: str,
    patience: float,
    *,
    as_json: bool,
    invited: JoinString | None,
) -> None:
    """Connect, take part, and end well however it ends. A paused round keeps the plan that it began with."""
    participant.stop = StopSignal(participant).asked
    report: dict[str, Any] = {}
    while not report:
        participant.plan, participant.only_finish = plans(), False
        if (both := paused_choices(participant.store, participant.plan)) is not None:
            participant.plan, participant.only_finish = both[0], True
            before, asked = (choices.cut for choices in both)
            note(f"finishing the round that was paused with cut {before}; after it, this client takes {asked}")
        report = take_part(participant, url, patience, invited)
    print_json({"report": report}) if as_json else print_report(report)


def take_part(participant: Participant, url: str, patience: float, invited: JoinString | None) -> dict[str, Any]:
    """One connection from Hello to goodbye; returns the closing report, {} when another connection is due."""
    from client_model.link import Link
    from client_model.participant import PausedError
    from client_model.shortage import ShortageError

    store = participant.store
    check_same_client(participant.name, store)
    journal = open_journal(store, participant.key_file, participant.plan, floor=repr(participant.floor), url=url)
    hello = first_words(participant.name, store, participant.plan, journal.head, url)
    tls = enrolled(invited, store.folder, patience) if invited else None
    first = 0.0 if store.closing() is not None else patience  # there is little left to wait for
    link = Link(url, hello, journal=journal, patience_s=first, say=note, tls=tls)
    try:
        welcome = link.open()
        link.patience.limit_s = patience
        return participant.run(link, welcome, url)
    except PausedError as paused:
        if not paused.in_round:
            say_goodbye(link, "interrupted")  # between rounds there is nothing that the server should wait for
            journal.drop()
        if not participant.stop():
            return {}
        note(f"paused; the state is in {store.folder}. Run the same command to go on.")
        raise KeyboardInterrupt from None
    except ShortageError:
        if participant.exhausted:
            say_goodbye(link, "failed")
            raise
        return {}
    except KeyboardInterrupt:
        say_goodbye(link, "interrupted")
        note(f"the state is in {store.folder}. Run the same command to go on.")
        raise
    except SplitFLError as error:
        if not (isinstance(error, StorageError) and journal.head):  # with room again it goes on where it is
            say_goodbye(link, "failed")
        if isinstance(error, LinkError) and (report := store.closing()) is not None:
            note(f"{error.message}; the rounds are over, so this is the report as it was saved")
            return report
        raise
    finally:
        link.close()


class StopSignal:
    """Ctrl-C: the first one ends after the step under way, the second one at once."""

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.count = 0
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self.participant.in_step:
            raise KeyboardInterrupt
        note("stopping after this step (Ctrl-C again: at once)")

    def asked(self) -> bool:
        return self.count > 0


def say_goodbye(link: Link, reason: Literal["interrupted", "failed"]) -> None:
    """Tell the server not to wait, if it can be told quickly."""
    from concurrent.futures import CancelledError, TimeoutError

    with suppress(SplitFLError, TimeoutError, CancelledError):
        link.request(Bye(0, 0, reason)).result(timeout=2)
