"""``splitfl invite``, ``revoke`` and ``clients``: who may join. They work while the service runs, and while not."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from splitfl.console import command, note, print_json

State = Annotated[Path, typer.Option(help="State folder of the trunk service.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")]


def invite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client's name in the federation.")],
    state: State,
    address: Annotated[
        str, typer.Option(help="HOST:PORT that clients dial, where it differs from what the service listens on.")
    ] = "",
    valid_hours: Annotated[float, typer.Option(help="Hours in which the invitation can be taken.")] = 72.0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print a join string: one line that lets one client join, once, and tells it which server to trust.

    It is a secret until it has been used. An earlier invitation of the same client that was not used is void.
    """
    with command(verbose=verbose):
        from server_model.authority import has_authority
        from server_model.invitations import invite as make_invitation

        known = has_authority(state)
        join = make_invitation(state, name, address=address, valid_s=3600 * valid_hours)
        if as_json:
            print_json({"join": str(join), "name": name, "address": join.netloc, "authority": join.authority})
        else:
            sys.stdout.write(f"{join}\n")
            note(f"good once, for {valid_hours:g} hours; send it to {name} by a channel that you both trust")
        if not known:
            note(f"a new certificate authority was made in {state}/tls: a running service has another --state")


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client to shut out.")],
    state: State,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Shut a client out: its certificates and invitations end, and an open connection is closed in a second or so."""
    with command(verbose=verbose):
        from server_model.invitations import open_registry

        open_registry(state).revoke(name)
        print_json({"revoked": name}) if as_json else note(f"{name} is revoked; invite it anew to let it back in")


def clients(state: State, as_json: Json = False, verbose: Verbose = False) -> None:
    """List everybody who was invited, with the state of their certificates."""
    with command(verbose=verbose):
        from server_model.invitations import open_registry

        found = open_registry(state).clients()
        if as_json:
            print_json({"clients": [asdict(client) for client in found]})
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("client", "status", "invited until", "certificate until", "last seen")
        for client in found:
            times = (client.invited_until, client.certificate_until, client.last_seen)
            table.add_row(client.name, client.status, *map(as_time, times))
        Console().print(table if found else "nobody has been invited yet")


def as_time(seconds: float) -> str:
    """Seconds since 1970 as local time; nothing for 0."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}" if seconds else ""
