"""``splitfl probe``: what this machine can carry of a model, every way to take part weighed, and which one is best.

Torch is imported inside, so that --help stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client_model.places import default_cache, default_state
from splitfl.console import command, note, print_json
from splitfl.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from client_model.scouting import Scouted
    from splitfl.planning.capability import LinkSpeed

MOST_BOTTOM = 2  # that are weighed for a folder without a federation


def probe(
    address: Annotated[
        str, typer.Argument(metavar="[JOIN]", help="As for `splitfl join`: measures against that server.")
    ] = "",
    model: Annotated[
        Path | None, typer.Option(help="Instead of JOIN: a Hugging Face checkpoint on this machine.")
    ] = None,
    federation: Annotated[
        Path | None, typer.Option(help="With --model: federation.toml to plan for; none: every cut is weighed.")
    ] = None,
    link: Annotated[
        str, typer.Option(metavar="UP,DOWN,RTT", help="With --model: Mbit/s up and down, and ms there and back.")
    ] = "100,100,20",
    name: Annotated[str, typer.Option(help="This client's name; a join string holds it already.")] = "",
    state: Annotated[Path | None, typer.Option(help="This client's state folder; the default is as for join.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for fetched parts and what was measured before.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads torch may use; 0 = all cores.")] = 0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that is away.")] = 600.0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure anew what is known from before.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an unencrypted link beyond this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure memory, arithmetic and link, weigh every plan, and say which `join --plan auto` would take, and why."""
    with command(verbose=verbose):
        if bool(address) == (model is not None):
            raise ConfigError("nothing to probe, or two things", "Give a join string, or --model DIR.")
        place, kept = prepare(device, threads), (cache or default_cache()).expanduser()
        if model is not None:
            found = look_at_folder(model, federation, parse_link(link), place, kept, refresh=refresh)
        else:
            found = visit(address, name, state, place, kept, patience, refresh=refresh, insecure=insecure)
        from client_model.plan_table import as_json as table_json
        from client_model.plan_table import show, weigh

        weighed = weigh(found)
        print_json(table_json(found, weighed)) if as_json else show(found, weighed)
        weighed.require_choice()


def prepare(device: str, threads: int) -> torch.device:
    """The device to measure; loads what a client would."""
    import torch

    import client_model.participant  # noqa: F401 - what a client holds before any model
    from splitfl.split.modes import choose_device

    if threads:
        torch.set_num_threads(threads)
    return choose_device(device)


def look_at_folder(
    model: Path, federation: Path | None, link: LinkSpeed, device: torch.device, cache: Path, *, refresh: bool
) -> Scouted:
    """Measure with a checkpoint on this machine; the link is what was said."""
    from client_model.bandwidth import LinkGauge
    from client_model.probe import Prober
    from client_model.scouting import Scouted
    from splitfl.config import load_federation, parse_federation
    from splitfl.files import sha256_of
    from splitfl.planning.shapes import ModelShape
    from splitfl.split.checkpoint import CheckpointFolder

    source = CheckpointFolder(model)
    layers = source.config.num_hidden_layers
    bottom = min(MOST_BOTTOM, layers)
    every_cut = {"min_bottom": 0, "max_bottom": bottom, "min_top": 0, "max_top": layers}
    every_cut |= {"n_bottom": min(1, layers), "n_top": min(1, layers)}
    settings = load_federation(federation) if federation else parse_federation({"model": every_cut}, "every cut")
    sizes = sorted((name, entry.shape, entry.dtype) for name, entry in source.entries.items())
    identity = sha256_of(f"{source.config.to_json_string()} {sizes}".encode())
    found = Prober(identity, model, settings, device, cache).probe(lambda: source, LinkGauge.of(link), refresh=refresh)
    return Scouted(identity, settings, ModelShape.of(source.config), found)


def visit(
    address: str,
    name: str,
    state: Path | None,
    device: torch.device,
    cache: Path,
    patience: float,
    *,
    refresh: bool,
    insecure: bool,
) -> Scouted:
    """Measure with a server. Raises ConfigError in the middle of a round, which a visit would cost."""
    from client_model.addresses import check_address, check_name, read_join_string, say_how_encrypted
    from client_model.identity import enrolled
    from client_model.scouting import Scout
    from client_model.store import ClientStore
    from splitfl.files import claimed

    invited = read_join_string(address, name)
    url = invited.url if invited else check_address(address, insecure=insecure)
    name = invited.name if invited else name
    check_name(name)
    say_how_encrypted(url)
    note("measuring this machine and the link to the server")
    folder = state or default_state(url, name, invited.authority if invited else "")
    with claimed(folder):
        store = ClientStore(folder)
        if store.journal.exists() or store.pause_folder.exists():
            raise ConfigError(
                "this client is in the middle of a round, which keeps its plan",
                "Join to finish it: it plans anew between rounds.",
            )
        tls = enrolled(invited, folder, patience) if invited else None
        return Scout(name, url, tls, cache, device, patience, note, refresh).look()


def parse_link(text: str) -> LinkSpeed:
    """``UP,DOWN,RTT`` in Mbit/s and ms. Raises ConfigError."""
    from splitfl.planning.capability import LinkSpeed

    try:
        up, down, rtt = (float(part) for part in text.split(","))
        if not (0 < up < 1e9 and 0 < down < 1e9 and 0 <= rtt < 1e6):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{text!r} is no link", "Write UP,DOWN,RTT: Mbit/s, Mbit/s, ms; such as 20,100,50.") from None
    return LinkSpeed(rtt / 1e3, up * 1e6 / 8, down * 1e6 / 8)
