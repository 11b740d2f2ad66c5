"""``splitfl serve`` and ``splitfl export``. Torch is imported inside, so that --help stays quick."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfl.console import command, is_loopback, note, parse_address, print_json
from splitfl.errors import INTERRUPTED_EXIT_CODE, SplitFLError
from splitfl.files import claimed

if TYPE_CHECKING:
    from server_model.admission import Admission
    from server_model.coordinator import Coordinator, Progress

LEAVING_S = 60.0  # how long a finished service waits for clients that are still there


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face checkpoint.")],
    state: Annotated[Path, typer.Option(help="Folder for checkpoints of the trunk and the merges.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes any free one.")] = "127.0.0.1:7000",
    federation: Annotated[Path | None, typer.Option(help="federation.toml; the defaults without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the federation in --state.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads torch may use; 0 = all cores.")] = 0,
    skip_check: Annotated[
        bool, typer.Option("--skip-check", help="Do not check that an unlisted model family splits exactly.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Take unencrypted clients too, from beyond this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each event.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Host the trunk of MODEL_DIR: batch the clients' steps, merge their heads, keep it all durable."""
    with command(verbose=verbose):
        host, port = parse_address(listen)
        plain = is_loopback(host) or insecure
        report = report_json if as_json else report_text
        from splitfl.pipe import tune_process

        tune_process(note)
        from server_model.admission import Admission

        with claimed(state):
            coordinator = prepare(
                model, federation, state, device, threads, report, resume=resume, check=not skip_check
            )
            asyncio.run(run(coordinator, Admission.open(state, plain=plain), host, port, report))


def prepare(
    model: Path,
    federation: Path | None,
    state: Path,
    device: str,
    threads: int,
    report: object,
    *,
    resume: bool,
    check: bool,
) -> Coordinator:
    """Load the trunk. Raises SplitFLError for anything that is wrong with model, settings or state."""
    import torch

    from server_model.coordinator import Coordinator
    from server_model.store import Store
    from splitfl.config import load_federation
    from splitfl.split.checkpoint import read_config
    from splitfl.split.modes import choose_device
    from splitfl.split.selfcheck import check_family_splits

    all_cores = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread alone: the trunk has its own
    settings = load_federation(federation) if federation or not resume else Store(state).federation()[1]
    if check:
        check_family_splits(read_config(model))
    return Coordinator(
        model,
        settings,
        state,
        device=choose_device(device),
        resume=resume,
        report=report,  # type: ignore[arg-type]
        threads=threads or all_cores,
    )


async def run(coordinator: Coordinator, admission: Admission, host: str, port: int, report: object) -> None:
    """Listen until the federation has ended and its clients have left, or a signal comes."""
    from server_model.coordinator import Progress
    from server_model.invitations import remember_address
    from server_model.service import Service
    from server_model.tasks import BACKGROUND_FAILURE
    from server_model.waiting import name_the_awaited
    from splitfl.federation.agreement import privacy_line

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, stopped)
    failures: list[BaseException] = []

    def background_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        if context["message"] == BACKGROUND_FAILURE:  # clients may wait for what it was to do: better to restart
            failures.append(context["exception"])
            stopped.set()

    loop.set_exception_handler(background_failure)
    service = Service(coordinator, admission)
    try:
        bound = await service.start(host, port)
        remember_address(admission.authority.folder.parent, host, bound)
        facts = listening(admission, host, bound, coordinator.rounds.durable)
        facts |= {"agreement": coordinator.terms.sha256, "privacy": privacy_line(coordinator.settings)}
        report(Progress("listening", facts))  # type: ignore[operator]
        ended = asyncio.create_task(until_everybody_left(coordinator))
        signalled = asyncio.create_task(stopped.wait())
        naming = asyncio.create_task(name_the_awaited(coordinator.rounds))
        await asyncio.wait([ended, signalled], return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, signalled, naming):
            task.cancel()
    finally:
        await service.stop()
        coordinator.close()
    if failures:
        raise SplitFLError(f"the service failed inside: {failures[0]!r}", "Start it again with --resume.")
    if stopped.is_set():
        done = coordinator.rounds.durable + 1
        note(f"stopped; {f'rounds up to {done} are' if done else 'no round is'} durable. Start again with --resume.")
        raise KeyboardInterrupt


def listening(admission: Admission, host: str, port: int, durable: int) -> dict[str, object]:
    """What an operator, or a program, wants to know of a service that is ready."""
    url = f"{'ws' if admission.plain else 'wss'}://{f'[{host}]' if ':' in host else host}:{port}"
    facts = {"url": url, "plain": admission.plain, "loopback": is_loopback(host)}
    facts |= {"authority": admission.authority.fingerprint, "new_authority": admission.new}
    return {**facts, "durable_round": durable}


def stop(stopped: asyncio.Event) -> None:
    """Ctrl-C: the first one ends in order, the second one at once; what is durable is whole either way."""
    if stopped.is_set():
        note("stopped at once; what was durable still is")
        os._exit(INTERRUPTED_EXIT_CODE)
    stopped.set()


async def until_everybody_left(coordinator: Coordinator) -> None:
    """Wait for the end, then for the clients to say goodbye: those that are there, and those that may come back."""
    ended_before = coordinator.rounds.finished.is_set()  # restarted after the end: clients may not know of it yet
    await coordinator.rounds.finished.wait()
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    while ended_before or len(coordinator.members):
        if any(member.connected for member in coordinator.members):
            quiet_since = loop.time()
        elif loop.time() - quiet_since > min(LEAVING_S, coordinator.settings.trunk.grace_s):
            return
        await asyncio.sleep(0.05)


def report_json(progress: Progress) -> None:
    """One object an event; a full disk under it, or a reader who is gone, does not end the federation."""
    with suppress(OSError):
        print_json({"event": progress.event, "time": progress.time, **progress.facts})


def report_text(progress: Progress) -> None:
    """One line an event for the operator; more when it begins."""
    facts = progress.facts
    if progress.event != "listening":
        note(f"{progress.time} {in_words(progress.event, facts)}")
        return
    if facts["new_authority"]:
        note("a new certificate authority was made: no earlier invitation or certificate is known here")
    say_where(str(facts["url"]), plain=bool(facts["plain"]), loopback=bool(facts["loopback"]))
    note(f"privacy {facts['privacy']}")
    note(f"agreement {facts['agreement']}: clients are shown its terms, and accept them before they take part")


def in_words(event: str, facts: Mapping[str, object]) -> str:
    """An event as an operator reads it."""
    match event:
        case "round_open":
            return f"round {as_number(facts['round'])} open for {', '.join(as_names(facts['cohort']))}"
        case "round_durable":
            return f"round {as_number(facts['round'])} merged and durable"
        case "late_update":
            becomes = "the next merge takes its change" if facts["kept"] else "dropped"
            return f"{facts['client']}: its update of round {as_number(facts['round'])} came late: {becomes}"
        case "late_in_step":
            return f"round {as_number(facts['round'])} goes on without {facts['client']}: its steps came too late"
        case "merge_refused":
            names = ", ".join(as_names(facts["tensors"]))
            place = f"round {as_number(facts['round'])}"
            return f"{place}: {names} stay as they were: {facts['reason']}"
        case "waiting_for":
            more = [f"{facts['missing']} more to open a round"] if facts["missing"] else []
            return "waiting for " + ", ".join(as_names(facts["clients"]) + more)
        case "sat_out":
            place = f"round {as_number(facts['round'])} step {as_number(facts['step'])}"
            return f"{place} goes on without {facts['client']}: {facts['reason']}"
        case "held_out_loss":
            loss, before = float(str(facts["loss"])), as_number(facts["round"])
            return f"{facts['client']}: held-out loss {loss:.3f} before round {before}"
        case "storage_error":
            return f"round {as_number(facts['round'])} cannot be written, trying again: {facts['error']}"
        case "left":
            return f"{facts['client']} left: {facts['reason']}"
        case "releases_dropped":
            return f"{int(str(facts['bytes'])) / 1e6:.1f} MB of kept activations made room: clients send them again"
        case "unencrypted":
            return f"WARNING: the link to {facts['client']} is NOT encrypted, and nobody proved to be {facts['client']}"
        case "finished":
            return "the federation has ended; export its model with: splitfl export --state STATE OUT"
        case other:
            return f"{facts.get('client', '')} {other.replace('_', ' ')}".strip()


def say_where(url: str, *, plain: bool, loopback: bool) -> None:
    """How clients come in, and loudly what is not encrypted."""
    note(f"listening on {url.partition('://')[2]}, TLS 1.3; let a client in with: splitfl invite NAME --state STATE")
    if plain and loopback:
        note(f"on this machine, also without encryption or login: splitfl join {url} --name NAME --data PATH")
    elif plain:
        note("WARNING: --insecure: clients may come WITHOUT encryption or login; anyone on the way can read those.")


def as_number(value: object) -> int:
    return int(str(value)) + 1


def as_names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the Hugging Face checkpoint.")],
    state: Annotated[Path, typer.Option(help="State folder of the trunk service.")],
    client: Annotated[
        Path | None, typer.Option(help="A client's state folder, for personal heads (merge.share = none).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    exporter: Annotated[
        str, typer.Option("--as", metavar="WHO", help="Who exports; the agreement says who may.")
    ] = "operator",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Write the federation's model as a plain Hugging Face checkpoint."""
    with command(verbose=verbose):
        from server_model.exporting import export_state

        facts = export_state(state, out, client=client, dtype=dtype, exporter=exporter)
        print_json(facts) if as_json else note(f"wrote {out}: {facts['tensors_trained']} trained tensors")
