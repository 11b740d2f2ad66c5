"""``splitfl join``: the thin client. All that does the work is imported inside, so that --help stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfl.console import command, note


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
        from client_model.addresses import check_address, check_name, read_join_string, say_how_encrypted
        from client_model.consent import Consent
        from client_model.floor import Floor
        from client_model.places import default_cache, default_state
        from client_model.taking_part import parse_plan, plans_of, prepare, run
        from client_model.telling import EventPrinter
        from splitfl.data.readers import check_beginning
        from splitfl.files import claimed
        from splitfl.pipe import tune_process

        tune_process(note)
        invited = read_join_string(address, name)
        url = invited.url if invited else check_address(address, insecure=insecure)
        name = invited.name if invited else name
        check_name(name)
        check_beginning(data, skip_bad=skip_bad)  # before anybody is asked anything and a token is spent
        choices = parse_plan(plan)
        say_how_encrypted(url)
        folder = state or default_state(url, name, invited.authority if invited else "")
        with claimed(folder):
            participant = prepare(name, data, folder, cache or default_cache(), device, threads)
            participant.skip_bad, participant.local_model = skip_bad, model
            participant.accept, participant.key_file = Consent(accept, as_json=as_json), key
            participant.floor = Floor.parse(privacy)
            participant.report = EventPrinter(as_json=as_json)
            plans = plans_of(participant, choices, url, patience, invited)
            run(participant, plans, url, patience, as_json=as_json, invited=invited)
