"""``splitfl join``: the thin client. Torch is imported inside, so that --help stays quick."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import typer
from pydantic import TypeAdapter, ValidationError

from client_model.consent import Consent
from client_model.floor import Floor
from client_model.places import default_cache, default_state
from splitfl.channel.joining import JoinString
from splitfl.config import parse_federation
from splitfl.console import command, is_loopback, note, print_json, require_loopback
from splitfl.cut import Cut
from splitfl.errors import ConfigError, LinkError, SplitFLError, StorageError
from splitfl.files import claimed
from splitfl.wire.messages import PROTOCOL_VERSIONS, Bye, Hello, Name

if TYPE_CHECKING:
    from ssl import SSLContext

    from client_model.events import Event
    from client_model.journal import Head, Journal
    from client_model.link import Link
    from client_model.participant import Participant
    from client_model.store import ClientStore


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
            help="Blocks to keep here, BOTTOM,TOP, from the next round on; auto takes the federation's own cut."
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
        invited = read_join_string(address, name)
        url = invited.url if invited else check_address(address, insecure=insecure)
        name = invited.name if invited else name
        check_name(name)
        check_data(data, skip_bad=skip_bad)
        cut = parse_plan(plan)
        folder = state or default_state(url, name, invited.authority if invited else "")
        with claimed(folder):
            participant = prepare(name, data, folder, cache or default_cache(), device, threads)
            participant.skip_bad, participant.local_model, participant.plan = skip_bad, model, cut
            participant.accept, participant.key_file = Consent(accept, as_json=as_json), key
            participant.floor = Floor.parse(privacy)
            participant.report = EventPrinter(as_json=as_json)
            run(participant, url, patience, as_json=as_json, invited=invited)


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


def parse_plan(plan: str) -> Cut | None:
    return None if plan == "auto" else Cut.parse(plan)


def prepare(name: str, data: Path, state: Path, cache: Path, device: str, threads: int) -> Participant:
    """A participant with its state folder; loads torch."""
    import torch

    from client_model.participant import Participant
    from client_model.store import ClientStore
    from splitfl.split.modes import choose_device

    if threads:
        torch.set_num_threads(threads)
    return Participant(name, data, ClientStore(state), cache.expanduser(), choose_device(device))


def run(participant: Participant, url: str, patience: float, *, as_json: bool, invited: JoinString | None) -> None:
    """Connect, take part, and end well however it ends. A paused round keeps the cut that it began with."""
    participant.stop = StopSignal(participant).asked
    if (cuts := cuts_of_pause(participant.store, participant.plan)) is not None:
        participant.plan, participant.only_finish = cuts[0], True
        note(f"finishing the round that was paused with cut {cuts[0]}; after it, this client takes {cuts[1]}")
        take_part(participant, url, patience, invited)
        participant.plan, participant.only_finish = cuts[1], False
    report = take_part(participant, url, patience, invited)
    print_json({"report": report}) if as_json else print_report(report)


def cuts_of_pause(store: ClientStore, plan: Cut | None) -> tuple[Cut, Cut] | None:
    """The cut of a round that was paused and the one that ``plan`` asks for now, where they differ."""
    if not store.pause_folder.exists():
        return None
    _, held = store.federation()
    before, asked = Cut(*held), asked_cut(store, plan)
    return (before, asked) if before != asked else None


def asked_cut(store: ClientStore, plan: Cut | None) -> Cut:
    """The cut that ``plan`` asks for; None is the federation's own, as the state folder knows it."""
    return plan or parse_federation(json.loads(store.federation()[0]), str(store.folder)).cut


def take_part(participant: Participant, url: str, patience: float, invited: JoinString | None) -> dict[str, Any]:
    """One connection from Hello to goodbye; returns the closing report, {} when the paused round was all to be done."""
    from client_model.link import Link
    from client_model.participant import PausedError

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
        if participant.only_finish and not participant.stop():
            return {}
        note(f"paused; the state is in {store.folder}. Run the same command to go on.")
        raise KeyboardInterrupt from None
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


def check_same_client(name: str, store: ClientStore) -> None:
    """Raise ConfigError when the state folder is another client's."""
    record = store.session()
    if record is not None and record.name != name:
        raise ConfigError(
            f"{store.folder} holds the state of client {record.name!r}", "Name another --state, or join as that one."
        )


def open_journal(
    store: ClientStore, key_file: Path | None, cut: Cut | None, *, floor: str = "", url: str = ""
) -> Journal:
    """The journal of a state folder; one that is damaged, or of another ``cut`` or ``floor``, is begun anew.

    So is one of another ``url``, unless TLS proves that it is the same server. Raises PrivacyError.
    """
    from client_model.journal import Journal
    from client_model.keys import open_key

    key = open_key(store.folder, key_file, may_create=not (store.folder / "ledger.sqlite").exists()).derived("journal")
    try:
        journal = Journal(store.journal, key)
    except StorageError as error:
        note(f"{error.message}: this client's part of the round is lost, and it goes on from its last snapshot")
        store.journal.unlink(missing_ok=True)
        return Journal(store.journal, key)
    head = journal.head
    if head is None:
        return journal
    if not is_same_server(head.url, url) or (head.cut, head.floor) != (str(asked_cut(store, cut)), floor):
        journal.drop()
    return journal


def is_same_server(before: str, url: str) -> bool:
    """Whether ``url`` leads to the server that ``before`` led to: by TLS it has to prove that, whatever its address."""
    return before == url or url.startswith("wss:")


def first_words(name: str, store: ClientStore, cut: Cut | None, head: Head | None, url: str) -> Hello:
    """Hello for a new session, for one that the journal ``head`` goes on with, or for one whose state is lost.

    The session's token is for the server at ``url`` that gave it.
    """
    record = store.session()
    last = record.token if record is not None and is_same_server(record.url, url) else ""
    return Hello(
        versions=PROTOCOL_VERSIONS,
        name=name,
        resume=last if head is None else head.token,
        fresh=head is None,
        round=max(store.rounds(), default=-1),
        software=f"splitfl {version('splitfl')}",
        n_bottom=cut.n_bottom if cut else -1,
        n_top=cut.n_top if cut else -1,
    )


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


LIVE = ("step", "baseline_step")  # on a terminal each such line replaces the one before


class EventPrinter:
    """Events as JSON lines on stdout, or as text for a person on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __call__(self, event: Event) -> None:
        if self.as_json:
            print_json({"event": event.event, **event.facts})
            return
        text = describe(event.event, event.facts)
        if event.event in LIVE and self.live:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        elif text:
            note(("\r\x1b[K" if self.live else "") + text)


#: what a client's person should know of the data, where it is not 0
REMARKS = {
    "skipped_rows": "rows skipped",
    "truncated_records": "rows cut off at batch.max_length",
    "parted_rows": "answers cut from their prompts by packing (batch.pack = false keeps rows whole)",
}


def describe(event: str, facts: dict[str, Any]) -> str:
    """One line for a person."""
    match event:
        case "fetching":
            return str(facts["text"])
        case "data":
            counts = f"{facts['train_records']} records to train on, {facts['held_out_records']} held out"
            text = f"data: {facts['rows']} rows, which make {counts}"
            return text + "".join(f", {facts[key]} {meaning}" for key, meaning in REMARKS.items() if facts[key])
        case "privacy":
            return f"privacy: {facts['mode']}. {facts['statement']}"
        case "ledger_went_back":
            return f"this client's ledger has {facts['rows']} rows, the server countersigned {facts['countersigned']}"
        case "baselines":
            return "training what this client would have reached without the trunk, to compare with"
        case "baseline_step":
            received = facts["bytes_received"] / 1e6
            return f"{facts['which']}, step {facts['step']} of {facts['steps']}, {received:.1f} MB received"
        case "data_changed":
            return "the data file has changed since this client began; going on with what is there now"
        case "waiting":
            return "waiting for the next round"
        case "step":
            sent, received = facts["bytes_sent"] / 1e6, facts["bytes_received"] / 1e6
            return (
                f"round {facts['round'] + 1} step {facts['step'] + 1}: loss {facts['loss']:.3f}, "
                f"{facts['tokens_per_s']:.0f} tokens/s, {sent:.1f} MB sent, {received:.1f} MB received"
            )
        case "evaluation":
            loss, words = facts["loss"], facts["perplexity"]
            return f"held-out loss {loss:.3f}, perplexity {words:.1f}, after {facts['round']} rounds"
        case "evaluation_failed":
            return f"held-out loss after {facts['round']} rounds could not be measured: {facts['reason']}"
        case "step_missed":
            return f"round {facts['round'] + 1} step {facts['step'] + 1} left out: {facts['reason']}"
        case "round_durable":
            late = "" if facts["merged"] else " (too late for this client's part)"
            return f"round {facts['round'] + 1} merged{late}"
        case "server_restarted":
            return f"the server restarted; going on after round {facts['durable_round'] + 1}"
        case "cut_changed":
            anew = "; activations leave anew, and are charged anew" if facts["released_anew"] else ""
            return f"this client's cut was {facts['before']} and is {facts['now']} from now on{anew}"
        case "resumed":
            return f"going on with round {facts['round'] + 1} at step {facts['step'] + 1}"
    return ""


def print_report(report: dict[str, Any]) -> None:
    """The closing report for a person, on stdout."""
    losses = report["held_out_losses"]
    rounds = f"part in {report['rounds_taken']} of {report['rounds']} rounds"
    lines = [f"{report['client']} in {report['federation']}: {rounds}, {report['seconds']:.0f} s"]
    lines = [*not_earned(report["baselines"]), *lines, *beside(report["baselines"])]
    if losses:
        ends = [losses[0], losses[-1]][: len(losses)]
        said = ", ".join(f"{entry['loss']:.3f} after {entry['round']} rounds" for entry in ends)
        lines.append(f"  held-out loss: {said} (nats per token)")
    lines += beside_personal(report)
    traffic = report["bytes"]
    lines.append(
        f"  link: {traffic['bytes_sent'] / 1e6:.1f} MB sent, {traffic['bytes_received'] / 1e6:.1f} MB received"
    )
    if report["starts"] > 1:
        lines.append(f"  counted over {report['starts']} starts of this client")
    if report["uncounted_starts"]:
        lines.append(
            f"  NOT counted on the link: traffic of {report['uncounted_starts']} of them after the last saved round"
        )
    lines += [f"  {line}" for line in privacy_lines(report["privacy"])]
    lines.append(f"  trained ends: {report['weights']}")
    sys.stdout.write("\n".join(lines) + "\n")


def not_earned(baselines: dict[str, Any] | None) -> list[str]:
    """The first line of a report when splitting gave this client nothing for what it let out."""
    if baselines is None or baselines["earned"]:
        return []
    return ["Splitting did NOT pay for this client: without the trunk's help, or alone, it would have done as well."]


def beside(baselines: dict[str, Any] | None) -> list[str]:
    """The federated result beside what the client would have reached without it."""
    if baselines is None:
        return []
    said = {"federated": baselines["federated"], "ends-only": baselines["ends_only"], "top-only": baselines["top_only"]}
    figures = [f"{name} {loss:.3f}" if loss is not None else f"{name} not measured" for name, loss in said.items()]
    steps = f"these two with this client's {baselines['steps']} steps"
    return [f"  on this client's held-out records: {', '.join(figures)} (nats per token; {steps})"]


def beside_personal(report: dict[str, Any]) -> list[str]:
    """The merged weights beside the client's own, or that its own are all there is."""
    if report["share"] == "none":
        return ["  heads are personal: this client's ends were merged with nobody's"]
    last = report["held_out_losses"][-1:]
    if report["personal"] is None or not last or last[0]["round"] != report["rounds"]:
        return []
    merged = last[0]["loss"]
    return [
        f"  your own weights before the last merge: {report['personal']:.3f}; merged: {merged:.3f} (nats per token)"
    ]


def privacy_lines(privacy: dict[str, Any]) -> list[str]:
    """The privacy section of the closing report for a person."""
    lines = [f"privacy: {privacy['mode']}. {privacy['statement']}"]
    lines.append(f"stayed here: {', '.join(privacy['stayed'])}")
    lines.append(f"told: {', '.join(privacy['told'])}")
    for kind, count in privacy["left"].items():
        lines.append(f"left: {count['releases']} x {kind}, {count['bytes'] / 1e6:.2f} MB")
    if privacy["mode"] != "off":
        lines += [f"{p['party']}: sees {p['sees']}; protected by {p['protection']}" for p in privacy["parties"]]
        lines.append(privacy["several_records"])
    ledger = privacy["ledger"]
    lines.append(f"ledger: {ledger['rows']} rows, ending in {ledger['head'][:16]}")
    return lines
